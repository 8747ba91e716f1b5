"""Optimizers: the distributed one, torch's by name, learning-rate schedules."""
