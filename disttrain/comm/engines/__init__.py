"""The engines: one file for each library that can carry a collective, and one for N virtual ranks in one process.

Each subclasses ``Communicator`` and implements four primitives. Nothing else imports these libraries.
"""
