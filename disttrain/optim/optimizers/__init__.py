"""Optimizers by name: torch's own, LARS and LAMB.

``sections.py`` has the config's ``optimizer:`` sections, which build them.
"""
