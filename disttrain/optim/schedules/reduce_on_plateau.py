"""A rate that falls when what is measured no longer does."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from disttrain.errors import UserError
from disttrain.optim.schedules.base import Schedule
from disttrain.optim.schedules.tracker import Tracker


class ReduceOnPlateau(Schedule):
    """The rate is multiplied by ``gamma`` after ``patience`` looks at a metric without progress: torch's own scheduler.

    It looks at the mean training loss of every ``every`` epochs (or steps), or at what each evaluation gives. That is
    equal on all ranks, and the state is part of a checkpoint.
    """

    by: Literal["step", "epoch"] = Field(default="epoch", description="what 'every' counts")
    every: int = Field(default=1, ge=1, description="epochs or steps between two looks at the training loss")
    metric: str = Field(
        default="loss", min_length=1, description="loss: of training; any other name: what evaluation gives under it"
    )
    mode: Literal["min", "max"] = Field(default="min", description="whether less of the metric is better, or more")
    gamma: float = Field(default=0.1, gt=0, lt=1, description="what the rate is multiplied by")
    patience: int = Field(default=10, ge=0, description="looks without progress that are put up with")
    threshold: float = Field(default=1e-4, ge=0, description="progress that counts")
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = Field(default=0, ge=0, description="looks after a cut during which none follows")
    min_factor: float = Field(default=0.0, ge=0, lt=1, description="the rate never falls below this part of itself")

    @model_validator(mode="after")
    def _check(self) -> ReduceOnPlateau:
        if self.metric != "loss" and (self.every != 1 or self.by != "epoch"):
            raise UserError(
                f"schedule.metric={self.metric!r} is looked at after every evaluation: leave out schedule.every and "
                "schedule.by, and set evaluation.every_epochs or evaluation.every_steps"
            )
        return self

    @property
    def needs_epochs(self) -> bool:
        return self.warmup_epochs > 0

    def factor(self, step: float, num_steps: int, steps_per_epoch: float | None = None) -> float:
        """The warm-up's factor alone; the tracker's comes on top of it."""
        warmup = self.warmup_length(steps_per_epoch)
        return self._rise(min(1.0, (step + 1) / warmup)) if step < warmup else 1.0

    def shape(self, time: float, length: float) -> float:
        return 1.0

    def tracker(self) -> Tracker:
        return Tracker(
            self.metric,
            mode=self.mode,
            factor=self.gamma,
            patience=self.patience,
            threshold=self.threshold,
            threshold_mode=self.threshold_mode,
            cooldown=self.cooldown,
            min_lr=self.min_factor,
        )
