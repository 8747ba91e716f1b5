"""Schedules, and the ``LearningRate`` that sets an optimizer's learning rates by one.

The learning rate of a parameter group at a step is::

    its initial rate x scale (of the batch size) x schedule's factor x gain (of a policy that grows the batch)

torch's optimizers keep the learning rate out of their momentum buffers, so a jump of the rate needs no momentum
correction (Goyal et al. 2017, remark 3). LARS keeps it inside, as in its paper, and has an option for the correction.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch.optim import Optimizer

from disttrain.errors import UserError
from disttrain.optim.schedules.plateau_tracker import PlateauTracker
from disttrain.validation import Registry, Section

_EXPONENTIAL_START = 0.01


class Schedule(Section, ABC):
    """A factor on the learning rate. The fields of each class are the config's ``schedule:`` section.

    The factor is a function of the step, which counts optimizer steps, skipped ones included. Warmup comes first, and
    ends at the full rate. With ``by: epoch`` the rate changes between epochs only, except during warmup.
    """

    by: Literal["step", "epoch"] = Field(default="step", description="unit of time; warmup always counts steps")
    warmup_steps: int = Field(
        default=0, ge=0, description="steps over which the rate rises from warmup_start_factor to its full value"
    )
    warmup_epochs: float = Field(default=0.0, ge=0, description="the same in epochs; the rate still rises every step")
    warmup: Literal["linear", "exponential"] = Field(default="linear", description="how the rate rises")
    warmup_start_factor: float | None = Field(
        default=None, ge=0, lt=1, description="factor that the rate rises from; null: 0 if linear, 0.01 if exponential"
    )

    counts_warmup: ClassVar[bool] = False
    """Whether ``time`` starts with the warmup instead of at its end."""

    @model_validator(mode="after")
    def _check_warmup(self) -> Schedule:
        if self.warmup_steps and self.warmup_epochs:
            raise UserError(
                f"schedule.warmup_steps={self.warmup_steps} and schedule.warmup_epochs={self.warmup_epochs:g} clash: "
                "set one of them"
            )
        if self.warmup == "exponential" and self.warmup_start_factor == 0:
            raise UserError("schedule.warmup_start_factor=0 cannot rise exponentially: set it above 0, such as 0.01")
        return self

    @abstractmethod
    def shape(self, time: float, length: float) -> float:
        """Return the factor after ``time`` of ``length`` steps or epochs, both without the warmup.

        ``time`` starts at 0 and may be larger than ``length``. It is whole with ``by: epoch``, and otherwise may have a
        fraction.
        """

    def factor(self, step: float, num_steps: int, steps_per_epoch: float | None = None) -> float:
        """Return the factor for step ``step``, counted from 0, of a run of ``num_steps``."""
        warmup = self.warmup_length(steps_per_epoch)
        if step < warmup:
            return self._warmup_factor(min(1.0, (step + 1) / warmup))
        start: float = 0 if self.counts_warmup else warmup
        time, length = step - start, num_steps - start
        if self.by == "epoch":
            assert steps_per_epoch is not None
            start = math.ceil(start / steps_per_epoch)
            time = max(0, math.floor(step / steps_per_epoch) - start)
            length = math.ceil(num_steps / steps_per_epoch) - start
        return self.shape(time, max(1, length))

    def warmup_length(self, steps_per_epoch: float | None) -> int:
        """Return the number of warmup steps."""
        if self.warmup_epochs:
            assert steps_per_epoch is not None
            return round(self.warmup_epochs * steps_per_epoch)
        return self.warmup_steps

    def _warmup_factor(self, progress: float) -> float:
        start = self.warmup_start_factor
        if self.warmup == "exponential":
            return float((_EXPONENTIAL_START if start is None else start) ** (1 - progress))
        return start + (1 - start) * progress if start else progress

    @property
    def needs_epochs(self) -> bool:
        """Whether the factor depends on the number of steps per epoch."""
        return self.by == "epoch" or self.warmup_epochs > 0

    def tracker(self) -> PlateauTracker | None:
        """Return what follows a metric, for a schedule that depends on one."""
        return None

    def notable_steps(self, num_steps: int, steps_per_epoch: float | None = None) -> set[int]:
        """Return the steps that a table of the schedule should show."""
        return {0, self.warmup_length(steps_per_epoch), num_steps - 1}

    def build(
        self, optimizer: Optimizer, num_steps: int, step: int = 0, steps_per_epoch: float | None = None
    ) -> LearningRate:
        """Return a ``LearningRate`` that applies this schedule to an optimizer, from step ``step`` on.

        Raises:
            UserError: The schedule does not fit the run.
        """
        return LearningRate(optimizer, self, num_steps, step=step, steps_per_epoch=steps_per_epoch)

    def check(
        self, num_steps: int, steps_per_epoch: float | None = None, key: str = "schedule", span: str = "run"
    ) -> None:
        """Raise UserError if the schedule does not fit a run of ``num_steps``.

        A schedule that needs epochs is checked only if ``steps_per_epoch`` is given. For the message, ``key`` is the
        config key of the schedule, and ``span`` what ``num_steps`` is the length of.
        """
        if self.needs_epochs and steps_per_epoch is None:
            return
        warmup = self.warmup_length(steps_per_epoch)
        if warmup >= num_steps and warmup > 0:
            given = (
                f"warmup_epochs={self.warmup_epochs:g} is {warmup} steps and"
                if self.warmup_epochs
                else f"warmup_steps={self.warmup_steps}"
            )
            remedy = "or raise epochs or max_steps" if span == "run" else "or make the part longer"
            raise UserError(f"{key}.{given} must be less than the {span}'s {num_steps} steps: lower it, {remedy}")


CLASSES: dict[str, type[Schedule]] = {}
"""Schedules by name. The package's ``__init__`` lists them: each of them imports this module."""

schedules: Registry[Schedule] = Registry("schedule", Schedule, CLASSES)  # type: ignore[type-abstract]


class LearningRate:
    """Sets ``group["lr"]`` of all parameter groups of an optimizer by a schedule. In your own loop::

        rate = disttrain.LearningRate(optimizer, {"name": "cosine", "warmup_steps": 100}, num_steps=5000)
        for batch in batches:
            ...
            optimizer.step()
            rate.step()

    Args:
        optimizer: A plain or distributed optimizer. The current rates of its groups are their initial ones; all are
            multiplied by the same factor.
        schedule: A name, a mapping as in a config, or an instance (``disttrain.optim.schedules``).
        num_steps: Optimizer steps of the whole run.
        steps_per_epoch: Steps per epoch at the initial batch size. Required by schedules that count epochs.
        scale: Factor on all rates, for the batch size.
        step: The current step, counted from 0. The rates are set for it immediately.

    Attributes:
        lr: The current rate of a group without a factor of its own.
        tracker: Follows a metric, if the schedule depends on one: see ``observe``.

    Raises:
        UserError: The schedule does not fit a run of ``num_steps``, or needs ``steps_per_epoch``.
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
        schedule = schedules.build(schedule)
        if schedule.needs_epochs and steps_per_epoch is None:
            raise UserError("the schedule counts epochs: pass steps_per_epoch, or set by=step and warmup_steps")
        schedule.check(num_steps, steps_per_epoch)
        self._optimizer, self._schedule, self._scale = optimizer, schedule, scale
        self._num_steps, self._steps_per_epoch = num_steps, steps_per_epoch
        self.tracker = schedule.tracker()
        for group in optimizer.param_groups:
            group["initial_lr"] = float(group.get("initial_lr", group["lr"]))  # a copy, as lr may be a tensor
        initial = [group["initial_lr"] for group in optimizer.param_groups]
        self._base = float(optimizer.defaults.get("lr", max(initial)))
        self.set(step)

    def set(self, step: float, gain: float = 1.0) -> None:
        """Set the rates for step ``step``, counted from 0.

        Where the batch grows, ``step`` may count samples in units of the initial batch, so that the schedule follows
        the data. All rates are multiplied by ``gain``, the gain of the larger batch.
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
                group["lr"].fill_(rate)  # in place: a compiled or captured step reads this tensor
            else:
                group["lr"] = rate

    def step(self, gain: float = 1.0) -> None:
        """Set the rates for the next step."""
        self.set(self._step + 1, gain)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Report metrics, equal on all ranks. Only ``reduce_on_plateau`` uses them, and only its own metric.

        The rates change with the next ``step`` or ``set``.
        """
        if self.tracker is not None and self.tracker.metric in metrics:
            self.tracker.observe(metrics[self.tracker.metric])

    def state_dict(self) -> dict[str, Any]:
        """Return the state, apart from the step, as JSON values."""
        return {} if self.tracker is None else {"tracker": self.tracker.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        if self.tracker is not None and "tracker" in state:
            self.tracker.load_state_dict(state["tracker"])
            self.set(self._step)
