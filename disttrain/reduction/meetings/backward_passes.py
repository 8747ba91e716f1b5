"""Detection of the end of a backward pass, re-entrant passes included."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

_BACKWARD_OF_A_FUNCTION = torch.autograd.function.BackwardCFunction.apply.__code__


class BackwardPasses:
    """The backward passes that are running, perhaps in several threads."""

    def __init__(self) -> None:
        self._ends: weakref.WeakValueDictionary[int, _PassEnd] = weakref.WeakValueDictionary()

    def note(self, on_end: Callable[[], None]) -> None:
        """Have autograd's engine call ``on_end`` once, at the end of the backward pass that runs this hook."""
        task = torch._C._current_graph_task_id()
        if task not in self._ends:
            end = _PassEnd(on_end)
            self._ends[task] = end
            torch.autograd.Variable._execution_engine.queue_callback(end)

    def finish(self, on_end: Callable[[], None]) -> bool:
        """Forget the pass that has just ended; ``on_end`` calls this. Return whether no other one is running.

        After a pass within another one, as of re-entrant checkpoints, ``on_end`` is called again at the end of the
        enclosing pass, even if that has no further hook.
        """
        self._ends.pop(torch._C._current_graph_task_id(), None)
        enclosing = _enclosing_node()
        if enclosing is not None:
            enclosing.register_hook(lambda *_: self.note(on_end))
            return False
        return not self._ends


class _PassEnd:
    """The callback at the end of a pass. It lives as long as the pass, so a pass that fails is forgotten."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end

    def __call__(self) -> None:
        self._on_end()


def _enclosing_node() -> Any:
    """Return the node whose Python ``backward`` has called the current backward pass; None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _BACKWARD_OF_A_FUNCTION:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None
