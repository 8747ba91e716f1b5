"""The distributed optimizer, optimizers by name, learning-rate schedules, layer-wise settings, weight averaging."""
