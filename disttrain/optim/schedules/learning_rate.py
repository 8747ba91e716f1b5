"""The learning rate of every group of parameters, step by step: the one place that sets it.

The rate of a group at a step is::

    its initial rate x scale (of the batch size) x schedule's factor x gain (of a policy that grows the batch)

Momentum needs no correction when the rate jumps (Goyal et al. 2017, remark 3): torch's optimizers keep the gradients'
sum in their buffers and multiply it by the present rate. LARS, which its paper writes otherwise, has an option for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from disttrain.errors import UserError

if TYPE_CHECKING:
    from disttrain.optim.schedules import Schedule


class LearningRate:
    """Sets ``group["lr"]`` of all groups of an optimizer from a schedule. In a user's own loop::

        rate = disttrain.LearningRate(optimizer, {"name": "cosine", "warmup_steps": 100}, num_steps=5000)
        for batch in batches:
            ...
            optimizer.step()
            rate.step()

    Args:
        optimizer: plain or distributed. Its groups' present rates are the initial ones, each multiplied alike.
        schedule: a name, a mapping as in a config, or an instance (``disttrain.optim.schedules``).
        num_steps: optimizer steps of the whole run.
        steps_per_epoch: of the initial batch; needed by schedules that count epochs.
        scale: of all rates, for the size of the batch.
        step: where the run stands; the rates are set for it at once.

    Attributes:
        lr: the rate that is set now, of a group that has no factor of its own.
        tracker: what follows a measurement, if the schedule does: see ``observe``.

    Raises:
        UserError: the schedule does not fit a run of ``num_steps``, or counts epochs of unknown length.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule | str | Mapping[str, Any],
        num_steps: int,
        *,
        steps_per_epoch: float | None = None,
        scale: float = 1.0,
        step: float = 0,
    ) -> None:
        from disttrain.optim.schedules import schedules  # which import this file

        schedule = schedules.build(schedule)
        if schedule.needs_epochs and steps_per_epoch is None:
            raise UserError("the schedule counts epochs: give steps_per_epoch too, or set by=step and warmup_steps")
        schedule.check(num_steps, steps_per_epoch)
        self._optimizer, self._schedule, self._scale = optimizer, schedule, scale
        self._num_steps, self._steps_per_epoch = num_steps, steps_per_epoch
        self.tracker = schedule.tracker()
        for group in optimizer.param_groups:
            group["initial_lr"] = float(group.get("initial_lr", group["lr"]))  # of its own, should the rate be a tensor
        initial = [group["initial_lr"] for group in optimizer.param_groups]
        self._base = float(optimizer.defaults.get("lr", max(initial)))
        self.set(step)

    def set(self, step: float, gain: float = 1.0) -> None:
        """Set the rates for step ``step``, counted from 0.

        Where the batch grows, ``step`` may be a count of samples in initial batches, so that the schedule follows the
        data; ``gain`` is what the grown batch multiplies all rates by.
        """
        self._step = step
        factor = self._schedule.factor(step, self._num_steps, self._steps_per_epoch)
        multiplier = self._scale * factor * gain
        if self.tracker is not None:
            multiplier *= self.tracker.factor
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

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Tell what was measured, equal on all ranks; only ``reduce_on_plateau`` listens, and to its metric alone.

        The rate follows with the next ``step`` or ``set``.
        """
        if self.tracker is not None and self.tracker.metric in metrics:
            self.tracker.observe(metrics[self.tracker.metric])

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must know besides its step, as JSON values."""
        return {} if self.tracker is None else {"tracker": self.tracker.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over ``state_dict`` of a run that goes on."""
        if self.tracker is not None and "tracker" in state:
            self.tracker.load_state_dict(state["tracker"])
            self.set(self._step)
