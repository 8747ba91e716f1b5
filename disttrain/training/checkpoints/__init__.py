"""Checkpoints: what they contain, how they are written in the background, verified, pruned and loaded.

``checkpointer.py`` is the interface that the trainer uses.
"""
