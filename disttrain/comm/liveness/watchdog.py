"""What the ranks' reports amount to: who holds up a collective that the others wait in, and who is slow.

It only judges. The guard brings the reports, one a beat from every rank, and does what has to be done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from disttrain.comm.liveness.activity import Report

# A report is up to one beat old: what was so in this many beats running is no accident of their order.
_BEATS_TO_BE_SURE = 3
_SLOW_BEATS = 6
_EVEN = "give all ranks equally many steps, or let them finish uneven data with optimizer.join()"
_LONGER = (
    "if that is right, raise watch.stall_seconds (null: wait for ever), in a script "
    "disttrain.init(watch=disttrain.comm.Watch(stall_seconds=None))"
)


class Watchdog:
    """Rank 0's view of all ranks; on the other ranks, their view of rank 0.

    Args:
        names: the ranks, as messages name them.
        stall: seconds that a rank may wait in a collective that others have not started; None: any time.
        late: seconds after which it is said that a rank waits so; None: not before ``stall``.
        slow: a rank is slow whose steps take so many times what those of the others do; None: none is.
    """

    def __init__(
        self,
        names: Sequence[str],
        stall: float | None = None,
        slow: float | None = None,
        late: float | None = None,
    ) -> None:
        self._names = names
        self._late = math.inf if late is None else late
        self._stall = math.inf if stall is None else stall
        self._slow = math.inf if slow is None else slow
        self._reports: dict[int, Report] = {}
        self._ended: set[int] = set()
        self._troubled: set[int] = set()
        self._stalls, self._lates, self._leavings = _Beats(), _Beats(), _Beats()
        self._slow_beats: dict[int, int] = {}

    def hear(self, rank: int, report: Any) -> None:
        """Note a rank's report, or the list that JSON has made of it."""
        if isinstance(report, list | tuple) and len(report) == len(Report._fields):
            self._reports[rank] = Report(*report)

    def end(self, rank: int) -> None:
        """A rank has said goodbye: what it told last stays so."""
        self._ended.add(rank)

    def trouble(self, rank: int) -> None:
        """A rank's engine has failed in the collective that the rank waits in."""
        self._troubled.add(rank)

    def doing(self, rank: int) -> str:
        """What was last heard of a rank, or ""."""
        return self._reports.get(rank, Report()).doing

    def abandoned(self) -> str | None:
        """Who has ended although others wait for it. To be called once a beat, and when a rank is in trouble.

        It will not come any more, so this does not take ``stall`` seconds.
        """
        fewest = min((self._reports[rank].started for rank in self._ended if rank in self._reports), default=math.inf)
        waiting = {rank: report for rank, report in self._waiting(0).items() if report.waits > fewest}
        number = self._leavings.sure(waiting, now=not self._troubled.isdisjoint(waiting))
        return self._explain(number, waiting) if number else None

    def late(self) -> str | None:
        """Who is late for what others wait in, once for each collective. To be called once a beat."""
        waiting = self._waiting(self._late)
        number = self._lates.sure(waiting)
        return self._explain(number, waiting) if number else None

    def stalled(self) -> str | None:
        """Who holds up the others, once for each collective. To be called once a beat."""
        waiting = self._waiting(self._stall)
        number = self._stalls.sure(waiting)
        return self._explain(number, waiting) if number else None

    def _waiting(self, seconds: float) -> dict[int, Report]:
        return {
            rank: report
            for rank, report in self._reports.items()
            if report.waits and report.seconds >= seconds and rank not in self._ended
        }

    def _explain(self, number: int, waiting: Mapping[int, Report]) -> str:
        waiting = {rank: report for rank, report in waiting.items() if report.waits == number}
        first, theirs = next(iter(waiting.items()))
        absent = [rank for rank, report in self._reports.items() if report.started < number]
        if not absent:
            return (
                f"{theirs.call} of {theirs.where} has not ended for {theirs.seconds:.0f} s although all ranks have "
                "started it: the network or the engine holds it up"
            )
        who = f"rank {first} waits" if len(waiting) == 1 else "the others wait"
        rank = min(absent, key=lambda rank: self._reports[rank].started)
        report, also = self._reports[rank], ""
        if len(absent) > 1:
            also = f", and {len(absent) - 1} more {'have' if len(absent) > 2 else 'has'} not come either"
        if rank in self._ended:
            return f"{self._names[rank]} has ended{also}; {who} in {theirs.call} of {theirs.where}: {_EVEN}"
        doing = report.doing or "its set-up"
        return (
            f"{self._names[rank]} has been in {doing} for {report.seconds:.0f} s{also}; {who} in {theirs.call} of "
            f"{theirs.where}: {_LONGER}"
        )

    def slowest(self) -> tuple[int, float] | None:
        """The rank whose steps take longest without their waiting, and how many times the others' median that is.

        None until every rank has made a step.
        """
        seconds = {rank: report.compute_seconds for rank, report in self._reports.items()}
        if len(seconds) < max(2, len(self._names)) or min(seconds.values()) <= 0:
            return None
        rank = max(seconds, key=lambda rank: seconds[rank])
        return rank, seconds[rank] / median(its for other, its in seconds.items() if other != rank)

    def slow(self) -> str | None:
        """Who is slow, if that has been so for some beats and is not yet told. To be called once a beat."""
        found = self.slowest()
        rank = found[0] if found is not None and found[1] > self._slow else None
        self._slow_beats = {} if rank is None else {rank: self._slow_beats.get(rank, 0) + 1}
        if found is None or rank is None or self._slow_beats[rank] != _SLOW_BEATS:
            return None
        seconds = self._reports[rank].compute_seconds
        return (
            f"{self._names[rank]} is slow: without waiting, a step takes it {seconds:.3g} s, {found[1]:.1f} times what "
            "it takes the others"
        )


class _Beats:
    """Whether the same has been waited for in some beats running, and has not been told yet."""

    def __init__(self) -> None:
        self._suspected, self._beats, self._told = 0, 0, 0

    def sure(self, waiting: Mapping[int, Report], now: bool = False) -> int:
        """The first collective waited for, if it is time to tell; or 0. ``now``: it is."""
        number = min((report.waits for report in waiting.values()), default=0)
        self._beats = self._beats + 1 if number and number == self._suspected else 1
        self._suspected = number
        if number in (0, self._told) or (self._beats < _BEATS_TO_BE_SURE and not now):
            return 0
        self._told = number
        return number
