"""How ranks notice that another rank is dead, stuck or slow, whichever engine carries the tensors.

Each rank records its activity, the guard exchanges these records over small TCP connections, and the
watchdog judges them.
"""
