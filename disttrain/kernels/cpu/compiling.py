"""How loops are compiled, and where what was compiled is kept: the one place that decides about numba's cache.

A cache saves each run seconds to a minute. So none is a reason for a warning, and never for a run to fail: installation
and home may be read-only, as they are in containers, the disk full, or the folder another user's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba

logger = logging.getLogger(__name__)

_REMEDY = "set NUMBA_CACHE_DIR to a folder that can be written to"


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` that does without Python's lock, and keeps what it compiled on disk if there is a place for it."""
    compile_ = numba.njit(nogil=True, **options)

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = compile_(function)
        if hasattr(dispatcher, "enable_caching"):  # not under NUMBA_DISABLE_JIT
            try:
                dispatcher.enable_caching()
            except (RuntimeError, OSError):  # numba looks for a folder at once
                _warn("neither the installation nor the home folder can be written to")
            else:
                dispatcher._cache = _Cache(dispatcher._cache)
        return dispatcher

    return decorate


def report() -> str:
    """Where compiled loops are kept, or what to do as they are not: for ``disttrain doctor``."""

    @compiled()
    def probe() -> int:
        return 1

    folder = probe._cache.cache_path
    return f"compiled loops are kept in {folder}" if folder else f"every run compiles its loops anew: {_REMEDY}"


class _Cache:
    """One of numba's caches, of which a file that cannot be read or written costs no more than compiling."""

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
        except Exception as error:  # OSError, or whatever unpickling half a file gives
            self._cache.disable()
            _warn(f"{self._cache.cache_path}: {type(error).__name__}: {error}")
            return None


_warned: list[str] = []


def _warn(reason: str) -> None:
    """Once a process: what keeps one loop out of the cache keeps out the others."""
    if not _warned:
        logger.warning("every run compiles its loops anew, as they cannot be cached (%s): %s", reason, _REMEDY)
    _warned.append(reason)
