"""Training runs: config, data, trainer, checkpoints, metrics."""
