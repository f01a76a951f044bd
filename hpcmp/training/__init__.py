"""The training run: configuration, trainer, metrics and time limits."""
