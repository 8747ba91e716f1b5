"""The kernels for GPUs, compiled by Triton.

``kernels.py`` is the interface; ``tiles*.py`` hold the programs that run on the device.
"""
