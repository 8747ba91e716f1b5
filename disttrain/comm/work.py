"""Collectives under way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

T = TypeVar("T", covariant=True)


class Work(Protocol[T]):
    """A collective under way."""

    def wait(self) -> T:
        """Block until it is done; the result. Calling it again gives the same result."""


class CompletedWork(Generic[T]):
    """Work that needed no crossing."""

    def __init__(self, result: T) -> None:
        self._result = result

    def wait(self) -> T:
        return self._result


class DeferredWork(Generic[T]):
    """Work whose end is a function to call once."""

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish

    def wait(self) -> T:
        if self._finish is not None:
            self._result = self._finish()
            self._finish = None
        return self._result
