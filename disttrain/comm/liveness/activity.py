"""What this rank is doing, for its guard to tell the others: attribute writes, no lock, no system call."""

from __future__ import annotations

import time
from typing import NamedTuple

_RECENT_STEPS = 10
_MAX_TEXT = 120
_NAMES = {"AllReduce": "all_reduce", "AllGather": "all_gather", "AllToAll": "all_to_all", "Broadcast": "broadcast"}


class Call(NamedTuple):
    """A collective that this rank has started.

    Attributes:
        number: among all of this rank's, from 1. It means one for all ranks that run the same program.
        place: its number within the step.
        kind: the class of the collective.
        account: what it is for, or None; made into text only where somebody asks.
    """

    number: int
    place: int
    kind: str
    account: object

    def __str__(self) -> str:
        what = "" if self.account is None else f" ({self.account})"
        return f"{_NAMES.get(self.kind, self.kind)} {self.place}{what}"[:_MAX_TEXT]


class Report(NamedTuple):
    """What a rank tells of itself; what JSON can hold.

    Attributes:
        step: of the training, from 1; 0 before it.
        phase: "data loading", "evaluation"; "" if unknown.
        seconds: for how long it has waited, or been in this phase if it does not wait.
        started: how many collectives it has started.
        waits: the number of the one that it waits for; 0 if it does not.
        call: that one, or else the last one started.
        compute_seconds: what a step takes it, lately, without waiting for others; 0 if unknown.
    """

    step: int = 0
    phase: str = ""
    seconds: float = 0.0
    started: int = 0
    waits: int = 0
    call: str = ""
    compute_seconds: float = 0.0

    @property
    def where(self) -> str:
        """``step 3's data loading``; "" if it has done nothing yet."""
        if self.step == 0:
            return self.phase or ("set-up" if self.started else "")
        return f"step {self.step}'s {self.phase}" if self.phase else f"step {self.step}"

    @property
    def doing(self) -> str:
        """The same, with the collective: ``step 3's backward pass, waiting in all_reduce 2 (bucket 1: topk)``."""
        return f"{self.where}, waiting in {self.call}" if self.waits else self.where


class Activity:
    """Written by a rank's main thread as it goes along, read by its guard's at any time.

    ``begin_step`` and ``enter`` are for whoever writes the training loop; without them the optimizer counts steps.
    """

    def __init__(self) -> None:
        self._step, self._phase, self._since = 0, "", time.monotonic()
        self._last: Call | None = None
        self._waits: tuple[Call, float] | None = None
        self._num_before_step = 0
        self._began = self._waited = self._compute_seconds = 0.0

    def begin_step(self, step: int, phase: str = "") -> None:
        """Step ``step``, from 1, begins here, with ``phase``."""
        self._num_before_step = self._last.number if self._last else 0
        self._step = step
        self.enter(phase)
        self._began, self._waited = self._since, 0.0

    def end_step(self) -> None:
        """The step ends here and the next one begins, unless ``begin_step`` is called later."""
        if self._began:
            seconds = time.monotonic() - self._began - self._waited
            before = self._compute_seconds or seconds
            self._compute_seconds = before + (seconds - before) / _RECENT_STEPS
        self.begin_step(self._step + 1)

    def enter(self, phase: str, step: int | None = None) -> None:
        """From here on this rank is in ``phase``: "data loading", "evaluation"; of ``step``, if that is another."""
        self._step = self._step if step is None else step
        self._phase, self._since = phase, time.monotonic()

    def start_call(self, kind: str, account: object) -> Call:
        number = self._last.number + 1 if self._last else 1
        self._last = Call(number, number - self._num_before_step, kind, account)
        return self._last

    def begin_wait(self, call: Call) -> None:
        self._waits = (call, time.monotonic())

    def end_wait(self) -> None:
        if self._waits is not None:
            self._waited += time.monotonic() - self._waits[1]
            self._waits = None

    def report(self) -> Report:
        """This very moment. Another thread may ask: what does not fit together then is put right by the next one."""
        last, waits = self._last, self._waits
        call, since = waits or (last, self._since)
        return Report(
            self._step,
            self._phase,
            time.monotonic() - since,
            last.number if last else 0,
            waits[0].number if waits else 0,
            "" if call is None else str(call),
            self._compute_seconds,
        )
