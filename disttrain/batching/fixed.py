"""A batch that stays as it is."""

from __future__ import annotations

from disttrain.batching.base import BatchPolicy, Situation


class Fixed(BatchPolicy):
    """The run's ``batch_size`` throughout."""

    def target(self, situation: Situation) -> float:
        return situation.batch_size
