"""Which samples each rank sees in each step, and how they are loaded.

The order of samples depends on seed, epoch and position alone, not on the number of ranks.
"""
