"""Ending a run when a held-out metric no longer gets better, and going back to the weights with which it was best.

What is decided on are the metrics of ``evaluate``, which are added up over ranks: so all ranks decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from disttrain.errors import UserError
from disttrain.validation import Section, hint


class EarlyStopping(Section):
    """The config's ``early_stopping:`` section. An evaluation is better if it beats the best by over ``min_delta``."""

    metric: str = Field(description="the held-out metric, as the task names it: accuracy, bits_per_byte, loss")
    mode: Literal["min", "max"] = Field(description="whether smaller or larger values are better")
    patience: int = Field(default=5, ge=1, description="evaluations in a row that are no better; then the run ends")
    min_delta: float = Field(default=0.0, ge=0, description="by how much a value must be better to count")
    restore_best: bool = Field(default=False, description="end with the weights of the best evaluation")

    def check(self, metrics: Mapping[str, Any]) -> None:
        """Raise UserError if there is no such metric."""
        if self.metric not in metrics:
            raise UserError(
                f"early_stopping.metric={self.metric!r} is no metric of the task{hint(self.metric, list(metrics))}"
            )


@dataclass
class _State:
    """JSON; saved with the run. ``seen`` is the step of the last evaluation."""

    metric: str
    mode: str
    best: float | None = None
    best_step: int = 0
    num_worse: int = 0
    seen: int = -1


class Stopper:
    """Watches the evaluations of a run. ``NoStopper`` is its twin for runs without a section.

    Attributes:
        best_weights: a copy of parameters and buffers at the best evaluation, in main memory, if ``restore_best``.
    """

    def __init__(self, section: EarlyStopping) -> None:
        self.section = section
        self.best_weights: dict[str, torch.Tensor] = {}
        self._state = _State(section.metric, section.mode)

    def check(self, metrics: Mapping[str, Any]) -> None:
        """Raise UserError if the metric is not among these."""
        self.section.check(metrics)

    @property
    def is_over(self) -> bool:
        """Whether the run should end. A later, more patient config may let it go on."""
        return self._state.num_worse >= self.section.patience

    @torch.no_grad()
    def see(self, step: int, metrics: Mapping[str, float], model: nn.Module) -> None:
        """Take in the evaluation of ``model`` after ``step``; the same one again, in a resumed run, changes nothing."""
        state = self._state
        if step <= state.seen:
            return
        state.seen = step
        value = metrics[self.section.metric]
        if not self._is_better(value):
            state.num_worse += 1
            return
        state.best, state.best_step, state.num_worse = value, step, 0
        if self.section.restore_best:
            self.best_weights = {
                name: tensor.to("cpu", copy=True)
                for name, tensor in model.state_dict().items()
                if isinstance(tensor, torch.Tensor)
            }

    def _is_better(self, value: float) -> bool:
        best = self._state.best
        if not math.isfinite(value) or best is None:
            return math.isfinite(value)
        gain = best - value if self.section.mode == "min" else value - best
        return gain > self.section.min_delta

    def restore(self, model: nn.Module) -> bool:
        """Put the best weights back, if there are any; whether it did."""
        if self.best_weights:
            model.load_state_dict(self.best_weights, strict=False)
        return bool(self.best_weights)

    def state_dict(self) -> dict[str, Any]:
        """JSON; ``best_weights`` are to be saved beside it."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any], best_weights: Mapping[str, torch.Tensor]) -> None:
        """Take over what a run saved; begin anew where that was of another metric, or lacks the weights to restore."""
        found = _State(**state) if state else self._state
        is_of_it = (found.metric, found.mode) == (self.section.metric, self.section.mode)
        if not is_of_it or (self.section.restore_best and found.best is not None and not best_weights):
            return
        self._state = found
        self.best_weights = dict(best_weights) if self.section.restore_best else {}

    def summary(self) -> dict[str, Any]:
        """For summary.json: the best value, its step, and whether the run ended with its weights."""
        best = {"metric": self.section.metric, "value": self._state.best, "step": self._state.best_step}
        return {"best": {**best, "restored": bool(self.best_weights)}}


class NoStopper:
    """The twin of ``Stopper`` that lets every run go on to its last step."""

    is_over = False
    best_weights: Mapping[str, torch.Tensor] = {}

    def check(self, metrics: Mapping[str, Any]) -> None: ...
    def see(self, step: int, metrics: Mapping[str, float], model: nn.Module) -> None: ...
    def restore(self, model: nn.Module) -> bool:
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any], best_weights: Mapping[str, torch.Tensor]) -> None: ...
    def summary(self) -> dict[str, Any]:
        return {}
