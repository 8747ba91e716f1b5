"""The engines: a module for each communication library, one for a single process, and one for virtual ranks.

Each subclasses ``Communicator`` and implements its four primitives. No other module imports these libraries.
"""
