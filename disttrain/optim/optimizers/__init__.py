"""Optimizers by name: torch's own, and LARS and LAMB.

``sections.py`` holds the config's ``optimizer:`` section, from which each of them is built.
"""
