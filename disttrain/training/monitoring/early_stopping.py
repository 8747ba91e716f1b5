"""Ending a run when a held-out metric no longer improves, and restoring the weights with which it was best.

Metrics are summed over ranks by ``evaluate``, so all ranks make the same decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from disttrain.validation import Section


class EarlyStopping(Section):
    """The config's ``early_stopping:`` section. An evaluation is better if it beats the best by over ``min_delta``."""

    metric: str = Field(description="the held-out metric, as the task names it: accuracy, bits_per_byte, loss")
    mode: Literal["min", "max"] = Field(description="whether smaller or larger values are better")
    patience: int = Field(default=5, ge=1, description="evaluations in a row without improvement that end the run")
    min_delta: float = Field(default=0.0, ge=0, description="smallest improvement that counts")
    restore_best: bool = Field(default=False, description="end with the weights of the best evaluation")


class Stopper:
    """Never stops: the base of ``EarlyStopper``, and what a run without ``early_stopping`` has."""

    should_stop = False

    def observe(self, step: int, metrics: Mapping[str, float], model: nn.Module) -> None:
        """Note the evaluation of ``model`` after ``step``."""

    def restore(self, model: nn.Module) -> bool:
        """Load the best weights into the model if there are any. Return whether there were."""
        return False

    def summary(self) -> dict[str, Any]:
        """Return entries for summary.json."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return ``values``, which are JSON, and ``tensors``: the best weights."""
        return {"values": {}, "tensors": {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class _State:
    """Saved as JSON. ``seen`` is the step of the last evaluation."""

    metric: str
    mode: str
    best: float | None = None
    best_step: int = 0
    num_worse: int = 0
    seen: int = -1


class EarlyStopper(Stopper):
    """Stops a run when its evaluations no longer improve.

    Attributes:
        best_weights: copies of parameters and buffers at the best evaluation, in main memory, if ``restore_best``.
    """

    def __init__(self, section: EarlyStopping) -> None:
        self.section = section
        self.best_weights: dict[str, torch.Tensor] = {}
        self._state = _State(section.metric, section.mode)

    @property
    def should_stop(self) -> bool:  # type: ignore[override]
        """Whether the run should end. With more patience in its config, a resumed run may continue."""
        return self._state.num_worse >= self.section.patience

    @torch.no_grad()
    def observe(self, step: int, metrics: Mapping[str, float], model: nn.Module) -> None:
        """Note the evaluation of ``model`` after ``step``. A resumed run may repeat one, which changes nothing."""
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
        improvement = best - value if self.section.mode == "min" else value - best
        return improvement > self.section.min_delta

    def restore(self, model: nn.Module) -> bool:
        if self.best_weights:
            model.load_state_dict(self.best_weights, strict=False)
        return bool(self.best_weights)

    def summary(self) -> dict[str, Any]:
        """Return the best value, its step, and whether the run has ended with its weights."""
        best = {"metric": self.section.metric, "value": self._state.best, "step": self._state.best_step}
        return {"best": {**best, "restored": bool(self.best_weights)}}

    def state_dict(self) -> dict[str, Any]:
        return {"values": asdict(self._state), "tensors": self.best_weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state, unless it is of another metric or lacks the weights to restore."""
        values, best_weights = state["values"], state["tensors"]
        saved = _State(**values) if values else self._state
        is_same_metric = (saved.metric, saved.mode) == (self.section.metric, self.section.mode)
        if not is_same_metric or (self.section.restore_best and saved.best is not None and not best_weights):
            return
        self._state = saved
        self.best_weights = dict(best_weights) if self.section.restore_best else {}
