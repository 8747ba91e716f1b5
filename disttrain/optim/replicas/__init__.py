"""Keeping the replicas identical: broadcast, average, compare.

All functions here are collectives over models or optimizers. None is part of the exchange of gradients.
"""
