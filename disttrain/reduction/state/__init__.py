"""Saving and loading the compressors' state, also on another number of ranks."""
