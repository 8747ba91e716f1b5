"""Reduce the learning rate when a metric stops improving."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from disttrain.errors import UserError
from disttrain.optim.schedules.learning_rate import Schedule
from disttrain.optim.schedules.plateau_tracker import PlateauTracker


class ReduceOnPlateau(Schedule):
    """Multiplies the rate by ``gamma`` when a metric has not improved for ``patience`` checks: torch's own scheduler.

    The metric is the mean training loss of every ``every`` epochs (or steps), or a metric of each evaluation. It is
    equal on all ranks, and the state is part of a checkpoint.
    """

    by: Literal["step", "epoch"] = Field(default="epoch", description="unit of 'every'")
    every: int = Field(default=1, ge=1, description="epochs or steps between two checks of the training loss")
    metric: str = Field(
        default="loss", min_length=1, description="loss: the training loss; any other name: a metric of evaluation"
    )
    mode: Literal["min", "max"] = Field(default="min", description="whether a lower or a higher metric is better")
    gamma: float = Field(default=0.1, gt=0, lt=1, description="what the rate is multiplied by")
    patience: int = Field(default=10, ge=0, description="checks without improvement that are tolerated")
    threshold: float = Field(default=1e-4, ge=0, description="smallest change that counts as an improvement")
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = Field(default=0, ge=0, description="checks after a reduction before the next may follow")
    min_factor: float = Field(default=0.0, ge=0, lt=1, description="lower bound of the factor on the rate")

    @model_validator(mode="after")
    def _check(self) -> ReduceOnPlateau:
        if self.metric != "loss" and (self.every != 1 or self.by != "epoch"):
            raise UserError(
                f"schedule.metric={self.metric!r} is checked after every evaluation: remove schedule.every and "
                "schedule.by, and set evaluation.every_epochs or evaluation.every_steps"
            )
        return self

    @property
    def needs_epochs(self) -> bool:
        return self.warmup_epochs > 0

    def factor(self, step: float, num_steps: int, steps_per_epoch: float | None = None) -> float:
        """Return the factor of the warmup alone; the tracker's is applied on top of it."""
        warmup = self.warmup_length(steps_per_epoch)
        return self._warmup_factor(min(1.0, (step + 1) / warmup)) if step < warmup else 1.0

    def shape(self, time: float, length: float) -> float:
        return 1.0

    def tracker(self) -> PlateauTracker:
        return PlateauTracker(
            self.metric,
            mode=self.mode,
            factor=self.gamma,
            patience=self.patience,
            threshold=self.threshold,
            threshold_mode=self.threshold_mode,
            cooldown=self.cooldown,
            min_lr=self.min_factor,
        )
