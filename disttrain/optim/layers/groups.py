"""Rates, weight decay and freezing layer by layer: rules by parameter name, and decay from the head down."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field, field_validator, model_validator
from torch import nn

from disttrain.errors import UserError
from disttrain.optim.layers.depth import depths
from disttrain.validation import Section, validate

_KEY = "layers"


class LayerRule(Section):
    """What the parameters of some names have of their own."""

    match: str = Field(default="*", min_length=1, description="a shell pattern of parameter names: 'embedding.*'")
    lr_factor: float | None = Field(default=None, gt=0, description="multiplies their rate, beside layers.decay")
    weight_decay: float | None = Field(default=None, ge=0, description="in place of the optimizer's, biases included")
    adapt: bool | None = Field(default=None, description="lars, lamb: whether they have a trust ratio")
    freeze: bool = Field(default=False, description="they are not trained")
    until_step: int | None = Field(
        default=None, ge=1, description="freeze: they are trained from this step on, counted from 0"
    )

    @model_validator(mode="after")
    def _check(self) -> LayerRule:
        says = [name for name in ("lr_factor", "weight_decay", "adapt") if getattr(self, name) is not None]
        if self.until_step is not None and not self.freeze:
            raise UserError(f"{_KEY}.rules ({self.match!r}) has until_step, which is for freeze: add freeze: true")
        if self.freeze and says and self.until_step is None:
            raise UserError(f"{_KEY}.rules ({self.match!r}) has freeze and {says[0]}, which clash: keep one of them")
        if not self.freeze and not says:
            raise UserError(f"{_KEY}.rules ({self.match!r}) says nothing: give lr_factor, weight_decay or freeze")
        return self


@dataclass(frozen=True)
class Assigned:
    """What one parameter gets. None: what the optimizer says."""

    lr_factor: float = 1.0
    weight_decay: float | None = None
    adapt: bool | None = None
    frozen: bool = False
    until_step: int | None = None

    @property
    def is_trained(self) -> bool:
        """At some time."""
        return not self.frozen or self.until_step is not None


class Layers(Section):
    """Fields are the config's ``layers:`` section. The first rule that matches a parameter's name decides.

    With ``decay`` d the head has the full rate, the layer before it d times that, the one before d^2 (Howard and Ruder
    2018; Clark et al. 2020). Layers are found from the order of modules (``optim.layers.depth``), unless ``order``
    names them. Rules' factors come on top.

    Example, in a user's own script::

        layers = disttrain.Layers(decay=0.8, rules=[{"match": "embedding.*", "freeze": True}])
        layers.freeze(model)
        optimizer = torch.optim.AdamW(layers.groups(model, lr=1e-3))
    """

    rules: tuple[LayerRule, ...] = Field(default=(), description="the first one that matches a parameter decides")
    decay: float = Field(default=1.0, gt=0, le=1, description="of the rate, from each layer to the one before it")
    order: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="patterns of parameter names, a layer each, from input to head"
    )

    @field_validator("rules", mode="before")
    @classmethod
    def _build_rules(cls, rules: Any) -> tuple[LayerRule, ...]:
        if not isinstance(rules, Sequence) or isinstance(rules, str):
            raise UserError("should be a list of rules, such as [{match: 'embedding.*', lr_factor: 0.1}]")
        return tuple(_build_rule(rule, f"{_KEY}.rules.{index}") for index, rule in enumerate(rules))

    @model_validator(mode="after")
    def _check(self) -> Layers:
        if self.order is not None and self.decay == 1:
            raise UserError(f"{_KEY}.order={list(self.order)} is for {_KEY}.decay: set that below 1")
        return self

    def assign(self, model: nn.Module) -> dict[str, Assigned]:
        """What each parameter gets, by name, in the model's order.

        Raises:
            UserError: a rule or a layer of ``order`` matches nothing, or nothing is left to train.
        """
        parameters = dict(model.named_parameters())
        deciding = {name: next((r for r in self.rules if fnmatchcase(name, r.match)), None) for name in parameters}
        for index, rule in enumerate(self.rules):
            if not any(decided is rule for decided in deciding.values()):
                raise UserError(f"{_KEY}.rules.{index} ({rule.match!r}) {_why_idle(rule.match, list(parameters))}")
        factors = self._factors(model)
        assigned = {
            name: Assigned(
                lr_factor=factors[name] * ((rule.lr_factor if rule else None) or 1.0),
                weight_decay=rule.weight_decay if rule else None,
                adapt=rule.adapt if rule else None,
                frozen=(rule.freeze if rule else False) or not parameters[name].requires_grad,
                until_step=rule.until_step if rule else None,
            )
            for name, rule in deciding.items()
        }
        if assigned and all(entry.frozen for entry in assigned.values()):
            raise UserError(f"{_KEY}.rules freeze every parameter: nothing is left to train at first")
        return assigned

    def freeze(self, model: nn.Module) -> None:
        """Freeze what rules freeze, for good or at first; to be called before an optimizer is wrapped."""
        assigned = self.assign(model)
        for name, parameter in model.named_parameters():
            if assigned[name].frozen:
                parameter.requires_grad_(False)

    def groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer, of the parameters that are ever trained: those with the same values together.

        Each has ``params`` and ``lr``, and ``weight_decay`` and ``adapt`` where a rule gives them.
        """
        assigned = self.assign(model)
        groups: dict[Assigned, dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            entry = assigned[name]
            if not entry.is_trained:
                continue
            group = groups.setdefault(entry, {"params": [], "lr": lr * entry.lr_factor})
            group["params"].append(parameter)
            if entry.weight_decay is not None:
                group["weight_decay"] = entry.weight_decay
            if entry.adapt is not None:
                group["adapt"] = entry.adapt
        return list(groups.values())

    def unfreezing(self, model: nn.Module) -> dict[int, list[nn.Parameter]]:
        """By ``until_step``, the parameters that are frozen until then."""
        assigned = self.assign(model)
        due: dict[int, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if (step := assigned[name].until_step) is not None:
                due.setdefault(step, []).append(parameter)
        return due

    def _factors(self, model: nn.Module) -> dict[str, float]:
        names = [name for name, _ in model.named_parameters()]
        if self.decay == 1:
            return dict.fromkeys(names, 1.0)
        depth = depths(model) if self.order is None else _ordered(self.order, names)
        deepest = max(depth.values())
        return {name: self.decay ** (deepest - depth[name]) for name in names}


def _build_rule(spec: Any, key: str) -> LayerRule:
    if isinstance(spec, LayerRule):
        return spec
    if not isinstance(spec, Mapping):
        raise UserError(f"{key}={spec!r} should be a section with keys {', '.join(LayerRule.model_fields)}")
    return validate(LayerRule, spec, key)


def _ordered(order: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """The number of the first pattern that matches each name."""
    depth = {
        name: next((index for index, pattern in enumerate(order) if fnmatchcase(name, pattern)), None) for name in names
    }
    for index, pattern in enumerate(order):
        if index not in depth.values():
            raise UserError(f"{_KEY}.order.{index} ({pattern!r}) {_why_idle(pattern, names)}")
    if missing := [name for name, found in depth.items() if found is None]:
        raise UserError(f"{_KEY}.order has no layer for {missing[0]!r}: add a pattern that matches it")
    return {name: found for name, found in depth.items() if found is not None}


def _why_idle(pattern: str, names: Sequence[str]) -> str:
    if any(fnmatchcase(name, pattern) for name in names):
        return "never decides: those before it take all that it matches"
    nearest = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
    return f"matches no parameter; the nearest name is {nearest[0]!r}" if nearest else "matches no parameter"
