"""Measurements of what this project claims: each row is a command that anyone can run."""
