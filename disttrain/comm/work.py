"""A collective that has been started and not yet waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from disttrain.comm.liveness.activity import Activity, Call

T = TypeVar("T")
S = TypeVar("S")


class Work(Generic[T]):
    """A collective in flight.

    Args:
        finish: blocks until the collective is done, and returns its result. Called once.
    """

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], Any] | None = finish
        self._result: Any = None
        self._trace: tuple[Activity, Call] | None = None

    @classmethod
    def completed(cls, result: T) -> Work[T]:
        """Work with nothing to wait for."""
        work = cls(lambda: result)
        work._finish, work._result = None, result
        return work

    @property
    def is_completed(self) -> bool:
        """Whether ``wait`` returns immediately."""
        return self._finish is None

    def then(self, function: Callable[[T], S]) -> Work[S]:
        """Return this work, with its result passed through ``function``. The original result is no longer available."""
        if self._finish is None:
            self._result = function(self._result)
        else:
            finish = self._finish
            self._finish = lambda: function(finish())
        return cast("Work[S]", self)

    def traced(self, activity: Activity, call: Call) -> Work[T]:
        """Return this work, which tells ``activity`` while its rank waits for it."""
        self._trace = (activity, call)
        return self

    def wait(self) -> T:
        """Block until the collective is done, and return its result. Further calls return the same result.

        If the engine raises, ``activity`` still shows this collective: that is where this rank was.
        """
        if self._finish is not None:
            if self._trace is None:
                self._result = self._finish()
            else:
                activity, call = self._trace
                activity.begin_wait(call)
                self._result = self._finish()
                activity.end_wait()
            self._finish = None
        return cast("T", self._result)
