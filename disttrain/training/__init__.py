"""Training runs: the trainer and its config, data, checkpoints and metrics.

A run is described by a ``Config`` and carried out by a ``Trainer`` on each rank.
"""
