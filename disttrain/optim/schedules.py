"""Learning rates over a run: a factor on the optimizer's own rate, as a pure function of the step.

Because the factor depends on the step alone, a run that goes on from a checkpoint needs no state but its step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from pydantic import Field
from torch.optim import Optimizer

from disttrain.errors import UserError
from disttrain.optim.learning_rate import LearningRate
from disttrain.validation import Registry, Section


class Schedule(Section, ABC):
    """Fields are the config's ``schedule:`` section. Steps count optimizer steps, skipped ones included."""

    warmup_steps: int = Field(
        default=0, ge=0, description="steps over which the rate rises linearly from 0 to its full value"
    )

    @abstractmethod
    def after_warmup(self, progress: float) -> float:
        """The factor at ``progress``, which goes from 0 (the warm-up's end) to 1 (the run's end)."""

    def factor(self, step: float, num_steps: int) -> float:
        """The factor for step ``step`` (from 0) of a run of ``num_steps``."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(min(1.0, (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)))

    def build(self, optimizer: Optimizer, num_steps: int, step: int = 0) -> LearningRate:
        """What sets the optimizer's rates, to be stepped once an optimizer step, that stands at ``step`` already.

        Raises:
            UserError: the warm-up is as long as the run.
        """
        return LearningRate(optimizer, self, num_steps, step=step)

    def check(self, num_steps: int) -> None:
        """Raise UserError if the schedule does not fit a run of ``num_steps``."""
        if self.warmup_steps >= num_steps and self.warmup_steps > 0:
            raise UserError(
                f"schedule.warmup_steps={self.warmup_steps} must be less than the run's {num_steps} steps: "
                "lower it, or raise epochs or max_steps"
            )


class Constant(Schedule):
    """The full rate from the warm-up's end on."""

    def after_warmup(self, progress: float) -> float:
        return 1.0


class Cosine(Schedule):
    """Half a cosine from the full rate down to ``final_lr_factor`` of it (Loshchilov and Hutter 2017, SGDR)."""

    final_lr_factor: float = Field(
        default=0.0, ge=0, le=1, description="what is left of the rate at the end of the run"
    )

    def after_warmup(self, progress: float) -> float:
        return self.final_lr_factor + (1 - self.final_lr_factor) * 0.5 * (1 + math.cos(math.pi * progress))


schedules: Registry[Schedule] = Registry("schedule", Schedule, {"constant": Constant, "cosine": Cosine})  # type: ignore[type-abstract]
