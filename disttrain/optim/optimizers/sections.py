"""Optimizers by name; the fields of each class are the config's ``optimizer:`` section.

These are torch's own, and LARS and LAMB, which torch lacks. torch's fused variant is used where there is one: it
updates all parameters in one pass over memory, also on the CPU.
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
    """The fields of every optimizer."""

    lr: float = Field(gt=0, description="learning rate, before the schedule's factor")
    weight_decay: float = Field(default=0.0, ge=0)
    l1: float = Field(default=0.0, ge=0, description="L1 regularization: l1 * sign(w) is added to the gradient")
    decay_1d: bool = Field(default=True, description="whether weight decay applies to biases and norms too")
    lr_scaling: Literal["none", "linear", "sqrt"] = Field(
        default="none", description="how lr scales with batch_size / base_batch_size (linear: Goyal et al. 2017)"
    )
    base_batch_size: int | None = Field(default=None, ge=1, description="the batch size that lr is tuned for")

    layerwise: ClassVar[bool] = False
    """Whether it has a trust ratio per parameter."""

    @model_validator(mode="after")
    def _check_scaling(self) -> OptimizerSection:
        if (self.lr_scaling == "none") != (self.base_batch_size is None):
            raise UserError(
                f"optimizer.base_batch_size={self.base_batch_size} and optimizer.lr_scaling={self.lr_scaling!r}: set "
                "both, with lr_scaling=linear or sqrt, or neither"
            )
        return self

    def scale(self, batch_size: int) -> float:
        """Return the factor on the learning rate for a global batch of ``batch_size`` samples."""
        if self.base_batch_size is None:
            return 1.0
        ratio = batch_size / self.base_batch_size
        return math.sqrt(ratio) if self.lr_scaling == "sqrt" else ratio

    def build(self, parameters: Parameters) -> Optimizer:
        """Return a torch optimizer over parameters or parameter groups.

        A group may have its own ``lr`` and ``weight_decay`` and, for LARS and LAMB, ``adapt``.
        """
        groups = self._groups(parameters)
        optimizer = self._build(groups)
        if any(group["l1"] or group["decoupled_decay"] for group in optimizer.param_groups):
            Regularization(optimizer)
        return optimizer

    @abstractmethod
    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Return the optimizer over groups that all have ``lr`` and ``weight_decay``."""

    def _groups(self, parameters: Parameters) -> list[dict[str, Any]]:
        given = list(parameters)
        groups = [dict(entry) for entry in given if isinstance(entry, dict)] or [{"params": given}]
        divided = [part for group in groups for part in self._split_by_dimension(group)]
        is_decoupled = getattr(self, "decoupled", False)
        for group in divided:
            decay = group.setdefault("weight_decay", self.weight_decay)
            group.update(weight_decay=0.0 if is_decoupled else decay, decoupled_decay=decay if is_decoupled else 0.0)
            group.setdefault("lr", self.lr)
            group["l1"] = self.l1
        return divided

    def _split_by_dimension(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """Split off biases and norms as a group without weight decay, unless they decay like the other parameters."""
        if self.decay_1d or "weight_decay" in group or self.weight_decay == 0:
            return [group]
        parameters = list(group["params"])
        matrices, vectors = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
        parts = [{**group, "params": matrices}, {**group, "params": vectors, "weight_decay": 0.0}]
        return [part for part in parts if part["params"]]


class _Decoupled(OptimizerSection, ABC):
    decoupled: bool = Field(
        default=False, description="apply weight decay to the weights themselves; false: add it to the gradient (L2)"
    )


class SGD(_Decoupled):
    """Stochastic gradient descent with momentum.

    The momentum buffer is kept without the learning rate, so past gradients follow the current learning rate. No
    momentum correction (Goyal et al. 2017, remark 3) is needed.
    """

    momentum: float = Field(default=0.0, ge=0, lt=1)
    nesterov: bool = False

    @model_validator(mode="after")
    def _check(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise UserError("optimizer.nesterov=true needs momentum: set optimizer.momentum, for example to 0.9")
        return self

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=True)


class Adagrad(_Decoupled):
    """Divides the gradient by the root of the sum of its squares (Duchi et al. 2011)."""

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
    """Takes steps in the units of the weights (Zeiler 2012); the learning rate is usually 1."""

    lr: float = Field(default=1.0, gt=0, description="learning rate, before the schedule's factor")
    rho: float = Field(default=0.9, ge=0, lt=1)
    eps: float = Field(default=1e-6, gt=0)

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.Adadelta(groups, lr=self.lr, rho=self.rho, eps=self.eps)


class RMSprop(_Decoupled):
    """Divides the gradient by the root of a moving average of its squares (Tieleman and Hinton 2012)."""

    alpha: float = Field(default=0.99, ge=0, lt=1, description="fraction of the average that each step keeps")
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    centered: bool = Field(default=False, description="divide by an estimate of the standard deviation instead")

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
    """Adaptive moment estimation (Kingma and Ba 2015)."""

    amsgrad: bool = False

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.Adam(groups, lr=self.lr, betas=self.betas, eps=self.eps, amsgrad=self.amsgrad, fused=True)


class AdamW(_Moments):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    amsgrad: bool = False

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, amsgrad=self.amsgrad, fused=True)


class Lars(_Decoupled):
    """SGD with steps proportional to the norm of the weights, layer by layer (You, Gitman and Ginsburg 2017)."""

    momentum: float = Field(default=0.9, ge=0, lt=1)
    trust_coefficient: float = Field(
        default=1e-3, gt=0, description="length of a step over the norm of the weights, at lr=1"
    )
    momentum_correction: bool = Field(
        default=False, description="past gradients follow the current learning rate; the paper's do not"
    )
    eps: float = Field(default=0.0, ge=0)
    decay_1d: bool = Field(default=False, description="whether weight decay applies to biases and norms too")

    layerwise = True

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return LARS(
            groups,
            lr=self.lr,
            momentum=self.momentum,
            trust_coefficient=self.trust_coefficient,
            momentum_correction=self.momentum_correction,
            eps=self.eps,
            decay_1d=True,  # the groups decide what decays
        )


class Lamb(_Moments):
    """Adam with steps proportional to the norm of the weights, layer by layer (You et al. 2020)."""

    eps: float = Field(default=1e-6, gt=0)
    bias_correction: bool = True
    norm_bounds: tuple[float, float] | None = Field(
        default=None, description="lower and upper bound of the weights' norm in the trust ratio; null: no bounds"
    )
    decay_1d: bool = Field(default=False, description="whether weight decay applies to biases and norms too")

    layerwise = True

    @model_validator(mode="after")
    def _check_bounds(self) -> Lamb:
        if self.norm_bounds is not None and not 0 <= self.norm_bounds[0] < self.norm_bounds[1]:
            raise UserError(f"optimizer.norm_bounds={list(self.norm_bounds)} must be increasing and at least 0")
        return self

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return LAMB(
            groups,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            bias_correction=self.bias_correction,
            norm_bounds=self.norm_bounds,
            decay_1d=True,  # the groups decide what decays
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
