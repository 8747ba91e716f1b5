"""Detection of dead, stuck and slow ranks, independent of the engine.

Each rank records its activity, the guard exchanges these records over small TCP connections, and the
watchdog evaluates them.
"""
