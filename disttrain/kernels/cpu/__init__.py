"""The kernels for CPUs, compiled by numba.

``kernels.py`` is the interface; the loops that it calls are grouped by the family of compressors that uses them.
"""
