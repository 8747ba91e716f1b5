"""Grow the batch where a schedule would cut the learning rate."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, field_validator

from disttrain.batching.policies.base import GrowingPolicy, PolicyInputs
from disttrain.errors import UserError


class Scheduled(GrowingPolicy):
    """At each milestone the batch is multiplied by ``factor``, where a schedule would divide the rate by it.

    The noise of an update goes with rate / batch size, so it falls alike (Smith et al. 2018, arXiv:1711.00489). What
    ``max_batch_size`` does not let the batch grow, the learning rate falls.
    """

    milestones: tuple[float, ...] = Field(min_length=1, description="in rising order")
    unit: Literal["epoch", "step"] = Field(default="epoch", description="what milestones count")
    factor: float = Field(default=2.0, gt=1)

    @field_validator("milestones")
    @classmethod
    def _check_milestones(cls, milestones: tuple[float, ...]) -> tuple[float, ...]:
        if milestones[0] <= 0 or any(after <= before for before, after in pairwise(milestones)):
            raise UserError("should be above 0 and in rising order")
        return milestones

    def target(self, situation: PolicyInputs) -> float:
        position = situation.epochs if self.unit == "epoch" else situation.step
        return situation.initial * self.factor ** sum(position >= milestone for milestone in self.milestones)

    def cut(self, target: float, batch_size: int) -> float:
        return min(1.0, batch_size / target)

    def check(self, batch_size: int, epochs: int | None, max_steps: int | None) -> None:
        super().check(batch_size, epochs, max_steps)
        end = epochs if self.unit == "epoch" else max_steps
        if end is not None and self.milestones[-1] >= end:
            key = "epochs" if self.unit == "epoch" else "max_steps"
            raise UserError(
                f"batch.milestones={list(self.milestones)}: the run ends at {key}={end}, so {self.milestones[-1]:g} is "
                "never reached: leave it out, or train longer"
            )
