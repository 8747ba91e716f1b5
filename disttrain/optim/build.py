"""torch's optimizers by name: the fields are the config's ``optimizer:`` section.

The fused variants update all parameters in one pass over memory, on the CPU too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from pydantic import Field, model_validator
from torch import nn

from disttrain.errors import UserError
from disttrain.validation import Registry, Section


class OptimizerSection(Section, ABC):
    """What every optimizer has."""

    lr: float = Field(gt=0, description="learning rate, before the schedule's factor")
    weight_decay: float = Field(default=0.0, ge=0)

    @abstractmethod
    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimizer over ``parameters``."""


class SGD(OptimizerSection):
    """Stochastic gradient descent, with momentum."""

    momentum: float = Field(default=0.0, ge=0, lt=1)
    nesterov: bool = False

    @model_validator(mode="after")
    def _check(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise UserError("optimizer.nesterov=true needs momentum: set optimizer.momentum, 0.9 say")
        return self

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=True,
        )


class AdamW(OptimizerSection):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)

    @model_validator(mode="after")
    def _check(self) -> AdamW:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas={list(self.betas)} must both be at least 0 and below 1")
        return self

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


optimizers: Registry[OptimizerSection] = Registry(
    "optimizer",
    OptimizerSection,  # type: ignore[type-abstract]
    {"sgd": SGD, "adamw": AdamW},
)
