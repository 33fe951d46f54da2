"""What is claimed of this project, measured: each module is a command that anyone can run."""
