"""Let a worker that trains on the CPU keep the memory that it frees."""

from __future__ import annotations

import ctypes
import os

# <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_LARGE, _LARGE_OF_OLD = 2**28, 2**25  # before glibc 2.35, 32 MiB are the most

_OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Tell glibc not to hand freed memory back to the kernel; whether it was told.

    Backward allocates every gradient anew, and glibc returns large blocks as soon as they are free: the kernel then has
    to clear the same pages in every step, which takes as long as a quarter of the whole computation. The price is that
    a worker keeps what it needed at its peak, and a little more, as blocks do not always fit where others were. Blocks
    above 256 MiB are still returned.

    Whoever sets one of glibc's own variables (``MALLOC_TRIM_THRESHOLD_`` and the like, or ``GLIBC_TUNABLES`` of
    ``glibc.malloc``) is left in charge. Other C libraries, and allocators that are preloaded, see nothing of it.
    """
    if any(name in os.environ for name in _OF_THE_USER) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no Linux, or a C library without it
        return False
    is_set = mallopt(_MMAP_THRESHOLD, _LARGE) or mallopt(_MMAP_THRESHOLD, _LARGE_OF_OLD)
    return bool(is_set and mallopt(_TRIM_THRESHOLD, _NEVER))
