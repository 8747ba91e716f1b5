"""Schedules that are a function of time alone, so that a resumed run needs no state but its step.

Each equals torch's scheduler of the same name, where there is one, up to rounding
(``tests/unit/optim/schedules/test_schedules.py``).
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from typing import Literal

from pydantic import Field, field_validator, model_validator

from disttrain.errors import UserError
from disttrain.optim.schedules.learning_rate import Schedule

_FINAL = Field(default=0.0, ge=0, le=1, description="factor on the rate at the end of the run")


class Constant(Schedule):
    """The full rate after the warmup."""

    def shape(self, time: float, length: float) -> float:
        return 1.0


class Step(Schedule):
    """Multiplies the rate by ``gamma`` every ``step_size`` steps or epochs, counted from the start of the run."""

    step_size: int = Field(ge=1, description="steps or epochs between two reductions")
    gamma: float = Field(default=0.1, gt=0, description="what the rate is multiplied by each time")

    counts_warmup = True

    def shape(self, time: float, length: float) -> float:
        return float(self.gamma ** (time // self.step_size))

    def notable_steps(self, num_steps: int, steps_per_epoch: float | None = None) -> set[int]:
        every = self.step_size * _steps_per_unit(self, steps_per_epoch)
        reductions = (math.ceil(every * index) for index in range(1, math.ceil(num_steps / every)))
        return super().notable_steps(num_steps, steps_per_epoch) | set(reductions)


class MultiStep(Schedule):
    """Multiplies the rate by ``gamma`` at each milestone, counted from the start of the run (Goyal et al. 2017)."""

    milestones: tuple[int, ...] = Field(
        min_length=1, description="steps or epochs of the reductions, in increasing order"
    )
    gamma: float = Field(default=0.1, gt=0, description="what the rate is multiplied by each time")

    counts_warmup = True

    @field_validator("milestones")
    @classmethod
    def _check_order(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if milestones[0] < 1 or any(a >= b for a, b in itertools.pairwise(milestones)):
            raise UserError(f"must be increasing and at least 1: use {sorted({m for m in milestones if m > 0}) or [1]}")
        return milestones

    def shape(self, time: float, length: float) -> float:
        return float(self.gamma ** bisect_right(self.milestones, time))

    def notable_steps(self, num_steps: int, steps_per_epoch: float | None = None) -> set[int]:
        unit = _steps_per_unit(self, steps_per_epoch)
        return super().notable_steps(num_steps, steps_per_epoch) | {math.ceil(unit * m) for m in self.milestones}

    def check(
        self, num_steps: int, steps_per_epoch: float | None = None, key: str = "schedule", span: str = "run"
    ) -> None:
        super().check(num_steps, steps_per_epoch, key, span)
        if self.needs_epochs and steps_per_epoch is None:
            return
        unit = _steps_per_unit(self, steps_per_epoch)
        first, last = self.milestones[0], self.milestones[-1]
        if (warmup := self.warmup_length(steps_per_epoch)) > first * unit:
            raise UserError(
                f"{key}.milestones={list(self.milestones)} start within the warmup of {warmup} steps: milestones are "
                f"counted from the start of the {span}; raise {first}, or shorten the warmup"
            )
        if last * unit >= num_steps:
            length = math.ceil(num_steps / unit)
            raise UserError(
                f"{key}.milestones={list(self.milestones)}: {self.by} {last} is never reached, the {span} has "
                f"{length} {self.by}s: lower or remove it"
            )


class Exponential(Schedule):
    """``gamma ** time``."""

    gamma: float = Field(gt=0, le=1, description="what the rate is multiplied by each step or epoch")

    def shape(self, time: float, length: float) -> float:
        return float(self.gamma**time)


class InverseTime(Schedule):
    """``1 / (1 + rate * time)``, a decay under which stochastic approximation converges (Robbins and Monro 1951)."""

    rate: float = Field(gt=0, description="speed of the decay: the factor is 1/2 after 1 / rate steps or epochs")

    def shape(self, time: float, length: float) -> float:
        return 1 / (1 + self.rate * time)


class Cosine(Schedule):
    """Half a cosine from the full rate to ``final_lr_factor`` of it (Loshchilov and Hutter 2017, SGDR)."""

    final_lr_factor: float = _FINAL

    def shape(self, time: float, length: float) -> float:
        progress = min(1.0, time / length)
        return self.final_lr_factor + (1 - self.final_lr_factor) * 0.5 * (1 + math.cos(math.pi * progress))


class Linear(Schedule):
    """A straight line from the full rate to ``final_lr_factor`` of it."""

    final_lr_factor: float = _FINAL

    def shape(self, time: float, length: float) -> float:
        return 1 + (self.final_lr_factor - 1) * min(1.0, time / length)


class Polynomial(Schedule):
    """``(1 - time / length) ** power``, down to ``final_lr_factor``. The LARS paper uses a power of 2."""

    power: float = Field(default=2.0, gt=0)
    final_lr_factor: float = _FINAL

    def shape(self, time: float, length: float) -> float:
        remaining = (1 - min(1.0, time / length)) ** self.power
        return float(self.final_lr_factor + (1 - self.final_lr_factor) * remaining)


class OneCycle(Schedule):
    """Rises to the full rate and falls again (Smith and Topin 2018, Super-Convergence), in two phases as torch's.

    It has its own warmup and takes no other. Momentum is not cycled.
    """

    peak_at: float = Field(default=0.3, gt=0, lt=1, description="fraction of the run in which the rate rises")
    start_factor: float = Field(default=1 / 25, gt=0, le=1, description="factor on the rate at the start")
    final_lr_factor: float = Field(default=1 / 250_000, ge=0, le=1, description="factor on the rate at the end")
    anneal: Literal["cosine", "linear"] = "cosine"

    @model_validator(mode="after")
    def _check(self) -> OneCycle:
        if self.warmup_steps or self.warmup_epochs:
            raise UserError(
                "schedule.name='one_cycle' cannot have a warmup, since it starts with one: remove warmup_steps and "
                "warmup_epochs, and set schedule.peak_at and schedule.start_factor"
            )
        return self

    def shape(self, time: float, length: float) -> float:
        peak, end = self.peak_at * length - 1, length - 1
        if time <= peak and peak > 0:
            return self._between(self.start_factor, 1.0, time / peak)
        peak = max(0.0, peak)
        return self._between(1.0, self.final_lr_factor, min(1.0, (time - peak) / (end - peak)) if end > peak else 1.0)

    def _between(self, start: float, end: float, progress: float) -> float:
        if self.anneal == "linear":
            return (end - start) * progress + start
        return end + (start - end) / 2 * (math.cos(math.pi * progress) + 1)

    def notable_steps(self, num_steps: int, steps_per_epoch: float | None = None) -> set[int]:
        return super().notable_steps(num_steps, steps_per_epoch) | {max(0, round(self.peak_at * num_steps) - 1)}


def _steps_per_unit(schedule: Schedule, steps_per_epoch: float | None) -> float:
    if schedule.by == "step":
        return 1
    assert steps_per_epoch is not None
    return steps_per_epoch
