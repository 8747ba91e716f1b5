"""Keeping the ranks' copies of a model alike: broadcast, average, compare.

All functions here are collectives over models or optimizers, outside the gradient's path.
"""
