"""What documents are made of: tables and generated blocks in Markdown, and the look of figures."""
