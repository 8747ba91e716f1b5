"""A large batch of constant size, whose learning rate is scaled by how much the batch helps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from disttrain.batching.policies.base import BatchPolicy, PolicyInputs
from disttrain.errors import UserError


class AdaScale(BatchPolicy):
    """``batch_size`` is S times ``base_batch_size``, for which the learning rate and the length of the run are chosen.

    The rate is multiplied by a gain between 1 and S: S where gradients are only noise, 1 where they have none. A step
    with a gain of r counts as r steps of the base batch, in the schedule and in ``epochs`` and ``max_steps``. The run
    ends when the gains add up to the steps of the base run (Johnson et al. 2020, arXiv:2007.05105).
    """

    progress_unit = "gains"

    base_batch_size: int = Field(
        ge=1, description="the batch size that optimizer.lr, epochs and max_steps are meant for"
    )
    lr_scaling: Literal["adascale"] = Field(default="adascale", description="always AdaScale's gain")

    def target_size(self, inputs: PolicyInputs) -> float:
        return inputs.batch_size

    def reference_size(self, batch_size: int) -> int:
        return self.base_batch_size

    def check(self, batch_size: int, epochs: int | None, max_steps: int | None) -> None:
        if self.base_batch_size > batch_size:
            raise UserError(
                f"batch.base_batch_size={self.base_batch_size} is above batch_size={batch_size}: "
                "batch_size is the larger one, to which AdaScale scales the learning rate"
            )
