"""What this rank is doing, for its guard to report. Recording takes attribute writes: no lock, no system call."""

from __future__ import annotations

import time
from typing import NamedTuple

_RECENT_STEPS = 10
_MAX_TEXT = 120
_NAMES = {"AllReduce": "all_reduce", "AllGather": "all_gather", "AllToAll": "all_to_all", "Broadcast": "broadcast"}


class Call(NamedTuple):
    """A collective that this rank has started.

    Attributes:
        number: its number among all collectives of this rank, from 1. The same on all ranks that run the same program.
        number_in_step: its number within the step, from 1.
        kind: the class of the collective.
        account: its purpose, or None; converted to text only for a report.
    """

    number: int
    number_in_step: int
    kind: str
    account: object

    def __str__(self) -> str:
        account = "" if self.account is None else f" ({self.account})"
        return f"{_NAMES.get(self.kind, self.kind)} {self.number_in_step}{account}"[:_MAX_TEXT]


class Report(NamedTuple):
    """A snapshot of a rank's activity, in types that JSON can represent.

    Attributes:
        step: training step, from 1; 0 before the first.
        phase: "data loading", "evaluation"; "" if unknown.
        seconds: how long the rank has been waiting or, if it is not waiting, how long it has been in this phase.
        num_started: number of collectives started.
        waiting_for: number of the collective that the rank is waiting for; 0 if it is not waiting.
        call: the collective that the rank is waiting for, else the last one that it started; "" if none.
        compute_seconds: recent average time of a step, excluding waits for other ranks; 0 if unknown.
    """

    step: int = 0
    phase: str = ""
    seconds: float = 0.0
    num_started: int = 0
    waiting_for: int = 0
    call: str = ""
    compute_seconds: float = 0.0

    @property
    def location(self) -> str:
        """Step and phase, such as ``step 3's data loading``; "" if the rank has done nothing yet."""
        if self.step == 0:
            return self.phase or ("setup" if self.num_started else "")
        return f"step {self.step}'s {self.phase}" if self.phase else f"step {self.step}"

    @property
    def activity(self) -> str:
        """The location and any wait: ``step 3's backward pass, waiting in all_reduce 2 (bucket 1: topk)``."""
        return f"{self.location}, waiting in {self.call}" if self.waiting_for else self.location


class Activity:
    """Current step, phase and collective of a rank. Its main thread writes them; its guard reads them at any time.

    A training loop may call ``begin_step`` and ``enter``. If it does not, the optimizer counts the steps.
    """

    def __init__(self) -> None:
        self._step, self._phase, self._phase_start = 0, "", time.monotonic()
        self._last_call: Call | None = None
        self._wait: tuple[Call, float] | None = None
        self._num_before_step = 0
        self._step_start = self._wait_seconds = self._compute_seconds = 0.0

    def begin_step(self, step: int, phase: str = "") -> None:
        """Start step ``step``, counted from 1, in phase ``phase``."""
        self._num_before_step = self._last_call.number if self._last_call else 0
        self._step = step
        self.enter(phase)
        self._step_start, self._wait_seconds = self._phase_start, 0.0

    def end_step(self) -> None:
        """End the step. The next one starts now, or at a later call of ``begin_step``."""
        if self._step_start:
            seconds = time.monotonic() - self._step_start - self._wait_seconds
            average = self._compute_seconds or seconds
            self._compute_seconds = average + (seconds - average) / _RECENT_STEPS
        self.begin_step(self._step + 1)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Enter a phase, such as "data loading" or "evaluation"; of step ``step``, if it is not the current one."""
        self._step = self._step if step is None else step
        self._phase, self._phase_start = phase, time.monotonic()

    def start_call(self, kind: str, account: object) -> Call:
        number = self._last_call.number + 1 if self._last_call else 1
        self._last_call = Call(number, number - self._num_before_step, kind, account)
        return self._last_call

    def begin_wait(self, call: Call) -> None:
        self._wait = (call, time.monotonic())

    def end_wait(self) -> None:
        if self._wait is not None:
            self._wait_seconds += time.monotonic() - self._wait[1]
            self._wait = None

    def report(self) -> Report:
        """Return the current activity.

        Another thread may call this. Its fields may then be inconsistent; the next report corrects them.
        """
        last_call, wait = self._last_call, self._wait
        call, start = wait or (last_call, self._phase_start)
        return Report(
            self._step,
            self._phase,
            time.monotonic() - start,
            last_call.number if last_call else 0,
            wait[0].number if wait else 0,
            "" if call is None else str(call),
            self._compute_seconds,
        )
