"""A task that trains in milliseconds, for tests of everything around it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from disttrain.tasks import Task, TensorData


class Tiny(Task):
    """Regression with two layers, initialized from a private generator, since simulated ranks share the global one."""

    num_samples: int = 50
    num_held_out: int = 13
    dropout: float = 0.0
    batch_norm: bool = False
    frozen: bool = False
    bad_step: int | None = None  # the training step (from 0) whose loss is infinite

    def build_model(self) -> nn.Module:
        hidden: list[nn.Module] = [nn.BatchNorm1d(8)] if self.batch_norm else []
        model = nn.Sequential(nn.Linear(6, 8), *hidden, nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(8, 2))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        model[0].bias.requires_grad_(not self.frozen)
        model.num_calls = 0  # type: ignore[assignment]
        return model

    def _data(self, seed: int, num_samples: int) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(num_samples, 6, generator=generator, dtype=torch.float64)
        return TensorData(inputs, torch.stack([inputs.sum(1).sin(), inputs[:, 0]], 1))

    def train_data(self) -> Dataset[Any]:
        return self._data(2, self.num_samples)

    def eval_data(self) -> Dataset[Any] | None:
        return self._data(3, self.num_held_out) if self.num_held_out else None

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        loss = F.mse_loss(model(batch[0]), batch[1])
        if model.num_calls == self.bad_step:
            loss = loss * math.inf
        model.num_calls += 1  # type: ignore[operator, assignment]
        return loss

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[torch.Tensor | float, int]]:
        return {"error": ((model(batch[0]) - batch[1]).square().sum(), len(batch[0]))}
