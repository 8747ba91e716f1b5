"""A complete user-defined task: which of three growers a wine comes from, by 13 chemical measurements.

launch/local.sh docs/examples/wine.yaml -n 2
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from sklearn.datasets import load_wine
from torch import nn

from disttrain.tasks import Task, TensorData


class Wine(Task):
    """Fields are the config's ``task:`` section. They are validated, and can be set as in ``task.hidden=64``."""

    hidden: int = Field(default=32, ge=1, description="units of the hidden layer")

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(13, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 3))

    def train_data(self) -> TensorData:
        return self._data(held_out=False)

    def eval_data(self) -> TensorData:
        return self._data(held_out=True)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        measurements, growers = batch
        return F.cross_entropy(model(measurements), growers)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[torch.Tensor | float, int]]:
        measurements, growers = batch
        return {"accuracy": ((model(measurements).argmax(1) == growers).sum(), len(growers))}

    def _data(self, held_out: bool) -> TensorData:
        """Return the training or held-out data; every fourth wine is held out."""
        x, y = (torch.from_numpy(array) for array in load_wine(return_X_y=True))
        is_held_out = torch.arange(len(y)) % 4 == 0
        x = (x - x[~is_held_out].mean(0)) / x[~is_held_out].std(0)
        chosen = is_held_out if held_out else ~is_held_out
        return TensorData(x[chosen].float(), y[chosen])
