"""Evaluates the reports of the ranks: which rank holds up a collective that others wait in, and which is slow.

The guard passes in the reports, one per heartbeat and rank, and acts on the messages returned here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from disttrain.comm.liveness.activity import Report

# Reports are up to one beat old. A condition that holds for this many consecutive beats is not an artifact of that.
_CONFIRMING_BEATS = 3
_SLOW_BEATS = 6
_UNEVEN_ADVICE = "give all ranks the same number of steps, or use optimizer.join() for uneven data"
_STALL_ADVICE = (
    "if this is expected, raise watch.stall_seconds (null: no limit); in a script, call "
    "disttrain.init(watch=disttrain.comm.Watch(stall_seconds=None))"
)


class Watchdog:
    """Rank 0's view of all ranks or, on the other ranks, their view of rank 0 and of themselves.

    The ``check_*`` methods return a message, or None if there is nothing new to report.

    Args:
        names: names of the ranks in messages.
        stall: seconds that a rank may wait in a collective; None for no limit.
        late: seconds after which such a wait is reported as late; None for never.
        straggler_factor: a rank is slow if its steps take more than this many times the median of the other ranks;
            None for never.
    """

    def __init__(
        self,
        names: Sequence[str],
        stall: float | None = None,
        straggler_factor: float | None = None,
        late: float | None = None,
    ) -> None:
        self._names = names
        self._late = math.inf if late is None else late
        self._stall = math.inf if stall is None else stall
        self._straggler_factor = math.inf if straggler_factor is None else straggler_factor
        self._reports: dict[int, Report] = {}
        self._finished: set[int] = set()
        self._raised: set[int] = set()
        self._stalled_calls, self._late_calls, self._abandoned_calls = _Debounce(), _Debounce(), _Debounce()
        self._slow_beats: dict[int, int] = {}

    def update(self, rank: int, report: Any) -> None:
        """Store a rank's report, given as a ``Report`` or as the list that JSON makes of it. Ignore anything else."""
        if isinstance(report, list | tuple) and len(report) == len(Report._fields):
            self._reports[rank] = Report(*report)

    def mark_finished(self, rank: int) -> None:
        """Record that a rank has said goodbye. Its last report remains valid."""
        self._finished.add(rank)

    def mark_raised(self, rank: int) -> None:
        """Record that a rank has raised an error. If its report shows a wait, the engine failed in that collective."""
        self._raised.add(rank)

    def last_activity(self, rank: int) -> str:
        """The activity in a rank's last report; "" if there is none."""
        return self._reports.get(rank, Report()).activity

    def check_finished(self) -> str | None:
        """Report a rank that has finished although others wait for it. Call on every beat and when a rank raises.

        The rank will never start the collective, so this does not wait ``stall`` seconds.
        """
        fewest = min(
            (self._reports[rank].num_started for rank in self._finished if rank in self._reports), default=math.inf
        )
        waiting = {rank: report for rank, report in self._waiting(0).items() if report.waiting_for > fewest}
        number = self._abandoned_calls.update(waiting, at_once=not self._raised.isdisjoint(waiting))
        return self._explain(number, waiting) if number else None

    def check_late(self) -> str | None:
        """Report a rank for which others have waited ``late`` seconds, once per collective. Call on every beat."""
        waiting = self._waiting(self._late)
        number = self._late_calls.update(waiting)
        return self._explain(number, waiting) if number else None

    def check_stalled(self) -> str | None:
        """Report a rank for which others have waited ``stall`` seconds, once per collective. Call on every beat."""
        waiting = self._waiting(self._stall)
        number = self._stalled_calls.update(waiting)
        return self._explain(number, waiting) if number else None

    def _waiting(self, seconds: float) -> dict[int, Report]:
        return {
            rank: report
            for rank, report in self._reports.items()
            if report.waiting_for and report.seconds >= seconds and rank not in self._finished
        }

    def _explain(self, number: int, waiting: Mapping[int, Report]) -> str:
        waiting = {rank: report for rank, report in waiting.items() if report.waiting_for == number}
        first, wait = next(iter(waiting.items()))
        call = f"{wait.call} of {wait.location}"
        behind = [rank for rank, report in self._reports.items() if report.num_started < number]
        if not behind:
            return (
                f"{call} has not completed in {wait.seconds:.0f} s although all ranks have started it: the network or "
                "the engine is stuck"
            )
        who = f"rank {first} is waiting" if len(waiting) == 1 else "other ranks are waiting"
        rank = min(behind, key=lambda rank: self._reports[rank].num_started)
        report, more = self._reports[rank], ""
        if len(behind) > 1:
            more = f" ({len(behind) - 1} more {'ranks are' if len(behind) > 2 else 'rank is'} behind)"
        if rank in self._finished:
            return f"{self._names[rank]} has finished{more}; {who} in {call}: {_UNEVEN_ADVICE}"
        activity = report.activity or "setup"
        return (
            f"{self._names[rank]} has been in {activity} for {report.seconds:.0f} s{more}; {who} in {call}: "
            f"{_STALL_ADVICE}"
        )

    def slowest(self) -> tuple[int, float] | None:
        """Return the rank with the longest compute time per step, and its ratio to the median of the other ranks.

        None until every rank has completed a step.
        """
        seconds = {rank: report.compute_seconds for rank, report in self._reports.items()}
        if len(seconds) < max(2, len(self._names)) or min(seconds.values()) <= 0:
            return None
        rank = max(seconds, key=lambda rank: seconds[rank])
        return rank, seconds[rank] / median(its for other, its in seconds.items() if other != rank)

    def check_slow(self) -> str | None:
        """Report a rank that has been slow for several consecutive beats, once. Call on every beat."""
        found = self.slowest()
        rank = found[0] if found is not None and found[1] > self._straggler_factor else None
        self._slow_beats = {} if rank is None else {rank: self._slow_beats.get(rank, 0) + 1}
        if found is None or rank is None or self._slow_beats[rank] != _SLOW_BEATS:
            return None
        seconds = self._reports[rank].compute_seconds
        return (
            f"{self._names[rank]} is slow: excluding waits, its steps take {seconds:.3g} s, {found[1]:.1f} times the "
            "median of the other ranks"
        )


class _Debounce:
    """Confirms that ranks have waited for the same collective in consecutive beats, once per collective."""

    def __init__(self) -> None:
        self._candidate, self._beats, self._confirmed = 0, 0, 0

    def update(self, waiting: Mapping[int, Report], at_once: bool = False) -> int:
        """Return the number of the first collective waited for if it is now confirmed, else 0.

        ``at_once`` confirms it in the first beat.
        """
        number = min((report.waiting_for for report in waiting.values()), default=0)
        self._beats = self._beats + 1 if number and number == self._candidate else 1
        self._candidate = number
        if number in (0, self._confirmed) or (self._beats < _CONFIRMING_BEATS and not at_once):
            return 0
        self._confirmed = number
        return number
