"""Grow the batch where the loss no longer falls fast enough."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from disttrain.batching.policies.base import GrowingPolicy, PolicyInputs


class Plateau(GrowingPolicy):
    """After an epoch whose mean training loss is above ``factor`` times the last one's, multiply by ``growth``."""

    needs_losses: ClassVar[bool] = True

    factor: float = Field(default=0.9, gt=0, description="an epoch's loss should be at most so many times the last")
    growth: float = Field(default=2.0, gt=1, description="what the batch is multiplied by")

    def target(self, situation: PolicyInputs) -> float:
        if situation.epoch_losses is None:
            return situation.batch_size
        last, before = situation.epoch_losses
        return situation.batch_size * (self.growth if last > self.factor * before else 1.0)
