"""The learning rate of every group of parameters, step by step: the one place that sets it.

The rate of a group at a step is::

    its initial rate x scale (of the batch size) x schedule's factor x gain (of a policy that grows the batch)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from disttrain.optim.schedules import Schedule


class LearningRate:
    """Sets ``group["lr"]`` of all groups of an optimizer from a schedule. In a user's own loop::

        rate = LearningRate(optimizer, schedules.build({"name": "cosine", "warmup_steps": 100}), num_steps=5000)
        for batch in batches:
            ...
            optimizer.step()
            rate.step()

    Args:
        optimizer: plain or distributed. Its groups' present rates are the initial ones, each multiplied alike.
        schedule: from ``schedules.build``.
        num_steps: optimizer steps of the whole run.
        scale: of all rates, for the size of the batch.
        step: where the run stands; the rates are set for it at once.

    Attributes:
        lr: the rate that is set now, of a group that has no factor of its own.

    Raises:
        UserError: the schedule does not fit a run of ``num_steps``.
    """

    def __init__(
        self, optimizer: Optimizer, schedule: Schedule, num_steps: int, *, scale: float = 1.0, step: float = 0
    ) -> None:
        schedule.check(num_steps)
        self._optimizer, self._schedule, self._num_steps, self._scale = optimizer, schedule, num_steps, scale
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        initial = [float(group["initial_lr"]) for group in optimizer.param_groups]
        self._base = float(optimizer.defaults.get("lr", max(initial)))
        self.set(step)

    def set(self, step: float, gain: float = 1.0) -> None:
        """Set the rates for step ``step``, counted from 0.

        Where the batch grows, ``step`` may be a count of samples in initial batches, so that the schedule follows the
        data; ``gain`` is what the grown batch multiplies all rates by.
        """
        self._step = step
        multiplier = self._scale * self._schedule.factor(step, self._num_steps) * gain
        self.lr = self._base * multiplier
        for group in self._optimizer.param_groups:
            rate = group["initial_lr"] * multiplier
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)  # what is captured or compiled reads this very tensor
            else:
                group["lr"] = rate

    def step(self, gain: float = 1.0) -> None:
        """Go on to the next step."""
        self.set(self._step + 1, gain)

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must know besides its step, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over ``state_dict`` of a run that goes on."""
