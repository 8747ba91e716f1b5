"""Grow the batch at given milestones, instead of reducing the learning rate."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, field_validator

from disttrain.batching.policies.base import GrowingPolicy, PolicyInputs
from disttrain.errors import UserError


class Scheduled(GrowingPolicy):
    """Multiplies the batch by ``factor`` at each milestone, where a schedule would divide the learning rate by it.

    The noise of an update is proportional to learning rate / batch size, so both reduce it equally (Smith et al. 2018,
    arXiv:1711.00489). Where ``max_batch_size`` keeps the batch from growing, the learning rate is reduced instead.
    """

    milestones: tuple[float, ...] = Field(min_length=1, description="when the batch grows, in increasing order")
    unit: Literal["epoch", "step"] = Field(default="epoch", description="unit of the milestones")
    factor: float = Field(default=2.0, gt=1, description="what the batch is multiplied by")

    @field_validator("milestones")
    @classmethod
    def _check_milestones(cls, milestones: tuple[float, ...]) -> tuple[float, ...]:
        if milestones[0] <= 0 or any(after <= before for before, after in pairwise(milestones)):
            raise UserError("should be above 0 and in increasing order")
        return milestones

    def target_size(self, inputs: PolicyInputs) -> float:
        position = inputs.epochs if self.unit == "epoch" else inputs.step
        return inputs.initial_size * self.factor ** sum(position >= milestone for milestone in self.milestones)

    def lr_factor(self, target_size: float, batch_size: int) -> float:
        return min(1.0, batch_size / target_size)

    def check(self, batch_size: int, epochs: int | None, max_steps: int | None) -> None:
        super().check(batch_size, epochs, max_steps)
        end = epochs if self.unit == "epoch" else max_steps
        if end is not None and self.milestones[-1] >= end:
            key = "epochs" if self.unit == "epoch" else "max_steps"
            raise UserError(
                f"batch.milestones={list(self.milestones)}: the run ends at {key}={end}, so {self.milestones[-1]:g} is "
                "never reached: remove it, or train longer"
            )
