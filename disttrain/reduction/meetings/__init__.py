"""How ranks agree on what to exchange and when to step.

Each rank reports its status, the ranks combine these in one all-reduce, and all draw the same conclusions.
"""
