"""Training, evaluation and comparison of models with TokenMixup."""
