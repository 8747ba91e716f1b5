"""Optimizers by name: the fields are the config's ``optimizer:`` section.

torch's own, and LARS and LAMB, which torch has not. The fused variants update all parameters in one pass over memory,
on the CPU too; where there is none, torch goes over lists of tensors on a GPU.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.optim import Optimizer

from disttrain.errors import UserError
from disttrain.optim.optimizers.lamb import LAMB
from disttrain.optim.optimizers.lars import LARS
from disttrain.optim.optimizers.regularization import Regularization
from disttrain.validation import Registry, Section

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class OptimizerSection(Section, ABC):
    """What every optimizer has."""

    lr: float = Field(gt=0, description="learning rate, before the schedule's factor")
    weight_decay: float = Field(default=0.0, ge=0)
    l1: float = Field(default=0.0, ge=0, description="times the sign of the weights is added to the gradient")
    decay_1d: bool = Field(default=True, description="whether biases and norms decay too")
    lr_scaling: Literal["none", "linear", "sqrt"] = Field(
        default="none", description="how the rate follows batch_size / base_batch_size (linear: Goyal et al. 2017)"
    )
    base_batch_size: int | None = Field(default=None, ge=1, description="the batch that lr is meant for")

    layerwise: ClassVar[bool] = False
    """Whether it has a trust ratio for each parameter."""

    @model_validator(mode="after")
    def _check_scaling(self) -> OptimizerSection:
        if (self.lr_scaling == "none") != (self.base_batch_size is None):
            raise UserError(
                f"optimizer.base_batch_size={self.base_batch_size} and optimizer.lr_scaling={self.lr_scaling!r}: set "
                "both, lr_scaling to linear or sqrt, or neither"
            )
        return self

    def scale(self, batch_size: int) -> float:
        """What the rate is multiplied by for a global batch of so many samples."""
        if self.base_batch_size is None:
            return 1.0
        ratio = batch_size / self.base_batch_size
        return math.sqrt(ratio) if self.lr_scaling == "sqrt" else ratio

    def build(self, parameters: Parameters) -> Optimizer:
        """The torch optimizer over ``parameters``, or over groups of them that may have an ``lr``, a ``weight_decay``
        and, for LARS and LAMB, ``adapt`` of their own."""
        groups = self._groups(parameters)
        optimizer = self._build(groups)
        if any(group["l1"] or group["decoupled_decay"] for group in optimizer.param_groups):
            Regularization(optimizer)
        return optimizer

    @abstractmethod
    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer over groups that have an ``lr`` and a ``weight_decay``."""

    def _groups(self, parameters: Parameters) -> list[dict[str, Any]]:
        given = list(parameters)
        groups = [dict(entry) for entry in given if isinstance(entry, dict)] or [{"params": given}]
        divided = [part for group in groups for part in self._by_dimension(group)]
        for group in divided:
            decay = group.setdefault("weight_decay", self.weight_decay)
            is_outside = getattr(self, "decoupled", False)
            group.update(weight_decay=0.0 if is_outside else decay, decoupled_decay=decay if is_outside else 0.0)
            group.setdefault("lr", self.lr)
            group["l1"] = self.l1
        return divided

    def _by_dimension(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """The group, in two where its biases and norms do not decay though the rest does."""
        if self.decay_1d or "weight_decay" in group or self.weight_decay == 0:
            return [group]
        parameters = list(group["params"])
        rest, flat = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
        parts = [{**group, "params": rest}, {**group, "params": flat, "weight_decay": 0.0}]
        return [part for part in parts if part["params"]]


class _Decoupled(OptimizerSection, ABC):
    decoupled: bool = Field(
        default=False, description="weight decay acts on the weights themselves; else it is L2, added to the gradient"
    )


class SGD(_Decoupled):
    """Stochastic gradient descent, with momentum.

    Its momentum is kept without the rate, so history follows the rate when that jumps: what Goyal et al. (2017, remark
    3) call momentum correction is built in.
    """

    momentum: float = Field(default=0.0, ge=0, lt=1)
    nesterov: bool = False

    @model_validator(mode="after")
    def _check(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise UserError("optimizer.nesterov=true needs momentum: set optimizer.momentum, 0.9 say")
        return self

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=True)


class Adagrad(_Decoupled):
    """Steps divided by the root of the sum of squares (Duchi et al. 2011)."""

    eps: float = Field(default=1e-10, gt=0)
    initial_accumulator_value: float = Field(default=0.0, ge=0)

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        on_cpu = all(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
        return torch.optim.Adagrad(
            groups,
            lr=self.lr,
            eps=self.eps,
            initial_accumulator_value=self.initial_accumulator_value,
            fused=on_cpu or None,
        )


class Adadelta(_Decoupled):
    """Steps in the units of the weights (Zeiler 2012); the rate is usually 1."""

    lr: float = Field(default=1.0, gt=0, description="learning rate, before the schedule's factor")
    rho: float = Field(default=0.9, ge=0, lt=1)
    eps: float = Field(default=1e-6, gt=0)

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.Adadelta(groups, lr=self.lr, rho=self.rho, eps=self.eps)


class RMSprop(_Decoupled):
    """Steps divided by the root of a mean of squares (Tieleman and Hinton 2012)."""

    alpha: float = Field(default=0.99, ge=0, lt=1, description="how much of the mean of squares is kept each step")
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    centered: bool = Field(default=False, description="divide by the standard deviation")

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.RMSprop(
            groups,
            lr=self.lr,
            alpha=self.alpha,
            eps=self.eps,
            momentum=self.momentum,
            centered=self.centered,
        )


class _Moments(OptimizerSection, ABC):
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)

    @model_validator(mode="after")
    def _check_betas(self) -> _Moments:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas={list(self.betas)} must both be at least 0 and below 1")
        return self


class Adam(_Moments, _Decoupled):
    """Adaptive moments (Kingma and Ba 2015)."""

    amsgrad: bool = False

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.Adam(groups, lr=self.lr, betas=self.betas, eps=self.eps, amsgrad=self.amsgrad, fused=True)


class AdamW(_Moments):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    amsgrad: bool = False

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, amsgrad=self.amsgrad, fused=True)


class Lars(_Decoupled):
    """SGD whose steps are scaled to the weights, layer by layer (You, Gitman and Ginsburg 2017)."""

    momentum: float = Field(default=0.9, ge=0, lt=1)
    trust_coefficient: float = Field(default=1e-3, gt=0, description="a step's part of the weights' norm, at rate 1")
    momentum_correction: bool = Field(
        default=False, description="history follows the rate when that changes; the paper's does not"
    )
    eps: float = Field(default=0.0, ge=0)
    decay_1d: bool = Field(default=False, description="whether biases and norms decay too")

    layerwise = True

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return LARS(
            groups,
            lr=self.lr,
            momentum=self.momentum,
            trust_coefficient=self.trust_coefficient,
            momentum_correction=self.momentum_correction,
            eps=self.eps,
            decay_1d=True,  # the groups say what decays
        )


class Lamb(_Moments):
    """Adam whose steps are scaled to the weights, layer by layer (You et al. 2020)."""

    eps: float = Field(default=1e-6, gt=0)
    bias_correction: bool = True
    norm_bounds: tuple[float, float] | None = Field(
        default=None, description="the least and the largest norm of weights that counts; null: any"
    )
    decay_1d: bool = Field(default=False, description="whether biases and norms decay too")

    layerwise = True

    @model_validator(mode="after")
    def _check_bounds(self) -> Lamb:
        if self.norm_bounds is not None and not 0 <= self.norm_bounds[0] < self.norm_bounds[1]:
            raise UserError(f"optimizer.norm_bounds={list(self.norm_bounds)} must rise from 0 or more")
        return self

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return LAMB(
            groups,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            bias_correction=self.bias_correction,
            norm_bounds=self.norm_bounds,
            decay_1d=True,  # the groups say what decays
        )


optimizers: Registry[OptimizerSection] = Registry(
    "optimizer",
    OptimizerSection,  # type: ignore[type-abstract]
    {
        "sgd": SGD,
        "adagrad": Adagrad,
        "adadelta": Adadelta,
        "rmsprop": RMSprop,
        "adam": Adam,
        "adamw": AdamW,
        "lars": Lars,
        "lamb": Lamb,
    },
)
