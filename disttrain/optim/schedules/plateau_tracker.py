"""A factor on the learning rate that falls when a metric stops improving: torch's ReduceLROnPlateau on a rate of 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau


class PlateauTracker:
    """Lowers its ``factor``, which starts at 1, as torch's scheduler lowers a learning rate.

    Args:
        metric: Name of the metric: "loss", or one that evaluation returns.
        options: Options of ``torch.optim.lr_scheduler.ReduceLROnPlateau``.
    """

    def __init__(self, metric: str, **options: Any) -> None:
        self.metric = metric
        # torch's scheduler lowers the rate of this optimizer, which starts at 1: the rate is the factor.
        self._optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        self._scheduler = ReduceLROnPlateau(self._optimizer, eps=0.0, **options)

    @property
    def factor(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def observe(self, value: float) -> None:
        """Record a new value of the metric. It must be equal on all ranks."""
        self._scheduler.step(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        best = float(self._scheduler.best)
        return {
            "factor": self.factor,
            "best": best if math.isfinite(best) else None,
            "num_bad_epochs": self._scheduler.num_bad_epochs,
            "cooldown_counter": self._scheduler.cooldown_counter,
            "last_epoch": self._scheduler.last_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        values = dict(state)
        self._optimizer.param_groups[0]["lr"] = values.pop("factor")
        if values["best"] is None:  # no value was observed yet
            del values["best"]
        self._scheduler.load_state_dict({**self._scheduler.state_dict(), **values})
