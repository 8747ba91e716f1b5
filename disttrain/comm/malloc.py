"""Keep freed memory in the process, for workers that train on the CPU."""

from __future__ import annotations

import ctypes
import os

# Parameters of mallopt, from <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER_TRIM = 2**31 - 1
_MAX_MMAP_THRESHOLD, _OLD_MAX_MMAP_THRESHOLD = 2**28, 2**25  # bytes; glibc before 2.35 allows at most 32 MiB

_USER_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Tell glibc not to return freed memory to the kernel. Returns whether glibc accepted it.

    Backward allocates new gradients in every step, and glibc by default returns large blocks as soon as they are freed.
    The kernel then has to clear the same pages again in every step, which can take a quarter as long as the whole
    computation. The cost is memory: a worker keeps what it needed at its peak, plus some fragmentation. Blocks above
    256 MiB are still returned.

    Does nothing if the user has set one of glibc's own variables: ``MALLOC_TRIM_THRESHOLD_`` and the like, or
    ``GLIBC_TUNABLES`` with an entry for ``glibc.malloc``. Other C libraries and preloaded allocators are not affected.
    """
    if any(name in os.environ for name in _USER_VARIABLES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not Linux, or a C library without mallopt
        return False
    is_set = mallopt(_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD) or mallopt(_MMAP_THRESHOLD, _OLD_MAX_MMAP_THRESHOLD)
    return bool(is_set and mallopt(_TRIM_THRESHOLD, _NEVER_TRIM))
