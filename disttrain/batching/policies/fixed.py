"""A batch that stays as it is."""

from __future__ import annotations

from disttrain.batching.policies.base import BatchPolicy, PolicyInputs


class Fixed(BatchPolicy):
    """The run's ``batch_size`` throughout."""

    def target(self, situation: PolicyInputs) -> float:
        return situation.batch_size
