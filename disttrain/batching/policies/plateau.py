"""Grow the batch when the training loss no longer falls fast enough."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from disttrain.batching.policies.base import GrowingPolicy, PolicyInputs


class Plateau(GrowingPolicy):
    """Multiplies the batch by ``growth`` after an epoch whose mean loss exceeds ``factor`` times the previous one's."""

    needs_losses: ClassVar[bool] = True

    factor: float = Field(
        default=0.9, gt=0, description="grow if an epoch's loss is more than this fraction of the previous one's"
    )
    growth: float = Field(default=2.0, gt=1, description="what the batch is multiplied by")

    def target_size(self, inputs: PolicyInputs) -> float:
        if inputs.epoch_losses is None:
            return inputs.batch_size
        loss, previous = inputs.epoch_losses
        return inputs.batch_size * (self.growth if loss > self.factor * previous else 1.0)
