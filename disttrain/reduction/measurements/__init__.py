"""Measurements while gradients are reduced: bytes on the wire, norms, and the error of compression.

Meters see each bucket before and after its exchange, in the steps in which they are due.
"""
