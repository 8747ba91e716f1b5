"""A second exchange, for gradients that came after their bucket had been closed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from disttrain.reduction.buckets.bucket import GradientBucket, Slot
from disttrain.reduction.exchange import Exchange, finish
from disttrain.reduction.meetings.status import Use


class LateGradients:
    """Collects late gradients before the mean replaces them in ``parameter.grad``.

    Args:
        buckets: all buckets.
        uses: use of each parameter by any rank; the same on all ranks.
    """

    def __init__(self, buckets: Sequence[GradientBucket], uses: Mapping[Slot, Use]) -> None:
        self._slots = {slot for slot, use in uses.items() if use is Use.LATE}
        self.buckets = [bucket for bucket in buckets if any(slot in self._slots for slot in bucket.slots)]
        self._gradients = {slot: slot.parameter.grad for bucket in self.buckets for slot in bucket.slots}

    def __bool__(self) -> bool:
        return bool(self.buckets)

    def exchange(self, launch: Callable[[GradientBucket], Exchange], scale: float) -> None:
        """Exchange the late gradients, and add ``scale`` times their mean to ``parameter.grad``."""
        for bucket in self.buckets:
            bucket.open()
            for slot in bucket.slots:
                slot.parameter.grad = self._gradients[slot]
            bucket.close()
        for index, outcome in finish([launch(bucket) for bucket in self.buckets]):
            bucket = self.buckets[index]
            bucket.finalize(*outcome, [slot in self._slots for slot in bucket.slots], scale)
            bucket.expose()
