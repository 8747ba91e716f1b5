"""Batch policies, one per file: each decides between two steps how large the next batch is.

``registry.py`` names them for the config's ``batch:`` section.
"""
