"""How loops are compiled, and where compiled code is cached. Only this module configures numba's cache.

The cache saves each run seconds to a minute. A run without it warns but never fails: the installation and the home
folder may be read-only (as in containers), the disk may be full, or the folder may belong to another user.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba

logger = logging.getLogger(__name__)

_REMEDY = "set NUMBA_CACHE_DIR to a folder that can be written to"


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` without the GIL, and with compiled code cached on disk if a folder is writable.

    Division by zero gives inf or NaN as in numpy: the exception of Python's keeps loops from being vectorized.
    """
    compile_ = numba.njit(nogil=True, error_model="numpy", **options)

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = compile_(function)
        if hasattr(dispatcher, "enable_caching"):  # not under NUMBA_DISABLE_JIT
            try:
                dispatcher.enable_caching()
            except (RuntimeError, OSError):  # numba looks for a folder immediately
                _warn("neither the installation nor the home folder can be written to")
            else:
                dispatcher._cache = _Cache(dispatcher._cache)
        return dispatcher

    return decorate


def report() -> str:
    """Say where compiled loops are cached, or how to enable the cache: for ``disttrain doctor``."""

    @compiled()
    def probe() -> int:
        return 1

    folder = probe._cache.cache_path
    return f"compiled loops are kept in {folder}" if folder else f"every run compiles its loops again: {_REMEDY}"


class _Cache:
    """One of numba's caches. A file that cannot be read or written only causes the loop to be compiled."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, signature: Any, context: Any) -> Any:
        return self._attempt("load_overload", signature, context)

    def save_overload(self, signature: Any, result: Any) -> None:
        self._attempt("save_overload", signature, result)

    def _attempt(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._cache, name)(*arguments)
        except Exception as error:  # OSError, or anything that unpickling a truncated file raises
            self._cache.disable()
            _warn(f"{self._cache.cache_path}: {type(error).__name__}: {error}")
            return None


_warned: list[str] = []


def _warn(reason: str) -> None:
    """Warn once a process, since all loops share the cause."""
    if not _warned:
        logger.warning("every run compiles its loops again, since they cannot be cached (%s): %s", reason, _REMEDY)
    _warned.append(reason)
