"""Buckets: groups of parameters whose gradients are exchanged together.

``bucketing.py`` groups parameters into buckets, and ``registry.py`` holds all buckets of a reducer.
"""
