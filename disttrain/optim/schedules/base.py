"""What every schedule has: its unit of time, its warm-up, and a factor that is a pure function of the step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch.optim import Optimizer

from disttrain.errors import UserError
from disttrain.optim.schedules.learning_rate import LearningRate
from disttrain.optim.schedules.tracker import Tracker
from disttrain.validation import Section

_EXPONENTIAL_START = 0.01


class Schedule(Section, ABC):
    """Fields are the config's ``schedule:`` section. Steps count optimizer steps, skipped ones included.

    A schedule begins where its warm-up ends, at the full rate. ``by: epoch`` changes the rate between epochs only.
    """

    by: Literal["step", "epoch"] = Field(default="step", description="what the schedule counts, but for its warm-up")
    warmup_steps: int = Field(
        default=0, ge=0, description="steps over which the rate rises from warmup_start_factor to its full value"
    )
    warmup_epochs: float = Field(default=0.0, ge=0, description="the same in epochs; it rises with each step too")
    warmup: Literal["linear", "exponential"] = Field(default="linear", description="how the rate rises")
    warmup_start_factor: float | None = Field(
        default=None, ge=0, lt=1, description="what the rate rises from; null: 0 if linear, 0.01 if exponential"
    )

    counts_warmup: ClassVar[bool] = False
    """Whether time begins with the warm-up, not at its end."""

    @model_validator(mode="after")
    def _check_warmup(self) -> Schedule:
        if self.warmup_steps and self.warmup_epochs:
            raise UserError(
                f"schedule.warmup_steps={self.warmup_steps} and schedule.warmup_epochs={self.warmup_epochs:g} clash: "
                "set one of them"
            )
        if self.warmup == "exponential" and self.warmup_start_factor == 0:
            raise UserError("schedule.warmup_start_factor=0 cannot rise exponentially: set it above 0, 0.01 say")
        return self

    @abstractmethod
    def shape(self, time: float, length: float) -> float:
        """The factor after ``time`` steps or epochs of ``length``; ``time`` may be more than that."""

    def factor(self, step: float, num_steps: int, steps_per_epoch: float | None = None) -> float:
        """The factor for step ``step`` (from 0) of a run of ``num_steps``."""
        warmup = self.warmup_length(steps_per_epoch)
        if step < warmup:
            return self._rise(min(1.0, (step + 1) / warmup))
        before: float = 0 if self.counts_warmup else warmup
        time, length = step - before, num_steps - before
        if self.by == "epoch":
            assert steps_per_epoch is not None
            before = math.ceil(before / steps_per_epoch)
            time = max(0, math.floor(step / steps_per_epoch) - before)
            length = math.ceil(num_steps / steps_per_epoch) - before
        return self.shape(time, max(1, length))

    def warmup_length(self, steps_per_epoch: float | None) -> int:
        """The warm-up in steps."""
        if self.warmup_epochs:
            assert steps_per_epoch is not None
            return round(self.warmup_epochs * steps_per_epoch)
        return self.warmup_steps

    def _rise(self, progress: float) -> float:
        start = self.warmup_start_factor
        if self.warmup == "exponential":
            return float((_EXPONENTIAL_START if start is None else start) ** (1 - progress))
        return start + (1 - start) * progress if start else progress

    @property
    def needs_epochs(self) -> bool:
        """Whether it can only be followed where the number of steps in an epoch is known."""
        return self.by == "epoch" or self.warmup_epochs > 0

    def tracker(self) -> Tracker | None:
        """What follows a measurement, for the schedule that does."""
        return None

    def notable(self, num_steps: int, steps_per_epoch: float | None = None) -> set[int]:
        """Steps at which something happens that a table of the schedule should show."""
        return {0, self.warmup_length(steps_per_epoch), num_steps - 1}

    def build(
        self, optimizer: Optimizer, num_steps: int, step: int = 0, steps_per_epoch: float | None = None
    ) -> LearningRate:
        """What sets the optimizer's rates, to be stepped once an optimizer step, that stands at ``step`` already.

        Raises:
            UserError: the schedule does not fit the run; the warm-up is as long as the run.
        """
        return LearningRate(optimizer, self, num_steps, step=step, steps_per_epoch=steps_per_epoch)

    def check(
        self, num_steps: int, steps_per_epoch: float | None = None, key: str = "schedule", span: str = "run"
    ) -> None:
        """Raise UserError if it does not fit a run of ``num_steps``, as far as that shows without the epochs' length.

        ``key`` is where the schedule stands, ``span`` what the steps are those of, for messages.
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
