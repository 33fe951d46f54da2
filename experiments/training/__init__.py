"""A training: from a config to final weights."""
