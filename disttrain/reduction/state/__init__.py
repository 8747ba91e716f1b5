"""Saving and loading the compressors' state, also on another number of ranks.

State is keyed by parameter name, so buckets may change in between.
"""
