"""Fused loops over gradients.

``reference`` defines each kernel in torch. ``cpu`` (numba) and ``cuda`` (Triton) are the fast implementations.
"""

from __future__ import annotations

import functools
import importlib
import warnings

import torch

from disttrain.kernels.chunks import Chunks, Entries
from disttrain.kernels.feedback import Feedback, Units
from disttrain.kernels.reference import Kernels

__all__ = ["Chunks", "Entries", "Feedback", "Kernels", "Units", "for_device"]

_BACKENDS = {"cpu": ("cpu.kernels", "CpuKernels", "numba"), "cuda": ("cuda.kernels", "CudaKernels", "triton")}


@functools.cache
def _load(device_type: str) -> Kernels:
    if device_type not in _BACKENDS:
        return Kernels()
    module, name, library = _BACKENDS[device_type]
    try:
        loaded = importlib.import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        warnings.warn(
            f"compression on {device_type} is several times slower without {library}: pip install {library}",
            RuntimeWarning,
            stacklevel=3,
        )
        return Kernels()
    kernels: Kernels = getattr(loaded, name)()
    return kernels


def for_device(device: torch.device) -> Kernels:
    """Return the fastest kernels for tensors on this device."""
    return _load(device.type)
