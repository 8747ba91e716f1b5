"""A large batch whose learning rate is raised by as much as the batch helps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from disttrain.batching.policies.base import BatchPolicy, PolicyInputs
from disttrain.errors import UserError


class AdaScale(BatchPolicy):
    """``batch_size`` is S times ``base_batch_size``; rate and run are those found good for the latter.

    The rate is multiplied by a gain r between 1 and S: S where gradients are all noise, 1 where they have none. A step
    counts for r steps of the base batch, in the schedule and in ``epochs`` and ``max_steps`` alike: so the run ends
    when the gains have added up to the base run's steps (Johnson et al. 2020, arXiv:2007.05105).
    """

    clock = "gains"

    base_batch_size: int = Field(
        ge=1, description="the batch size that optimizer.lr, epochs and max_steps are meant for"
    )
    lr_scaling: Literal["adascale"] = Field(default="adascale", description="always AdaScale's gain")

    def target(self, situation: PolicyInputs) -> float:
        return situation.batch_size

    def reference(self, batch_size: int) -> int:
        return self.base_batch_size

    def check(self, batch_size: int, epochs: int | None, max_steps: int | None) -> None:
        if self.base_batch_size > batch_size:
            raise UserError(
                f"batch.base_batch_size={self.base_batch_size} is above batch_size={batch_size}: "
                "batch_size is the large one, to which the learning rate is scaled"
            )
