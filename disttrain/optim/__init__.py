"""Everything between the mean gradient and the weights.

The distributed optimizer, optimizers by name, learning-rate schedules, layer-wise settings, weight averages, and the
synchronization of replicas.
"""
