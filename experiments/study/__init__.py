"""Studies: many trainings that answer one question, from one YAML file to one page of results."""
