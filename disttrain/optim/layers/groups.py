"""Learning rates, weight decay and freezing layer by layer: rules by parameter name, and rates that decay by depth."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field, field_validator, model_validator
from torch import nn

from disttrain.errors import UserError
from disttrain.optim.layers.depth import layer_depths
from disttrain.validation import Section, validate

_KEY = "layers"


class LayerRule(Section):
    """Settings for the parameters whose names match a pattern."""

    match: str = Field(default="*", min_length=1, description="shell pattern of parameter names, such as 'embedding.*'")
    lr_factor: float | None = Field(default=None, gt=0, description="factor on their learning rate, besides the decay")
    weight_decay: float | None = Field(
        default=None, ge=0, description="replaces the optimizer's weight decay, for biases and norms too"
    )
    adapt: bool | None = Field(default=None, description="lars, lamb: whether they have a trust ratio")
    freeze: bool = Field(default=False, description="do not train them")
    until_step: int | None = Field(
        default=None, ge=1, description="with freeze: train them from this step on, counted from 0"
    )

    @model_validator(mode="after")
    def _check(self) -> LayerRule:
        settings = [name for name in ("lr_factor", "weight_decay", "adapt") if getattr(self, name) is not None]
        if self.until_step is not None and not self.freeze:
            raise UserError(f"{_KEY}.rules ({self.match!r}) has until_step without freeze: add freeze: true")
        if self.freeze and settings and self.until_step is None:
            raise UserError(
                f"{_KEY}.rules ({self.match!r}) has freeze and {settings[0]}, which clash: keep one of them"
            )
        if not self.freeze and not settings:
            raise UserError(f"{_KEY}.rules ({self.match!r}) sets nothing: add lr_factor, weight_decay or freeze")
        return self


@dataclass(frozen=True)
class ParameterSettings:
    """The settings of one parameter. None: the optimizer's."""

    lr_factor: float = 1.0
    weight_decay: float | None = None
    adapt: bool | None = None
    frozen: bool = False
    until_step: int | None = None

    @property
    def is_trained(self) -> bool:
        """Whether the parameter is trained at any time."""
        return not self.frozen or self.until_step is not None


class Layers(Section):
    """Fields are the config's ``layers:`` section. The first rule that matches a parameter's name applies.

    With ``decay`` d the head has the full learning rate, the layer before it d times that, the one before d^2 (Howard
    and Ruder 2018; Clark et al. 2020). Layers are found from the order of modules (``optim.layers.depth``), unless
    ``order`` names them. The factors of rules are multiplied by the decay.

    Example::

        layers = disttrain.Layers(decay=0.8, rules=[{"match": "embedding.*", "freeze": True}])
        layers.freeze(model)
        optimizer = torch.optim.AdamW(layers.groups(model, lr=1e-3))
    """

    rules: tuple[LayerRule, ...] = Field(default=(), description="the first rule that matches a parameter applies")
    decay: float = Field(
        default=1.0, gt=0, le=1, description="factor on the learning rate from each layer to the one before it"
    )
    order: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="patterns of parameter names, one per layer, from input to head"
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
            raise UserError(f"{_KEY}.order={list(self.order)} has no effect without {_KEY}.decay: set that below 1")
        return self

    def assign(self, model: nn.Module) -> dict[str, ParameterSettings]:
        """Return the settings of each parameter by name, in the model's order.

        Raises:
            UserError: A rule or a pattern of ``order`` matches nothing, or every parameter would be frozen.
        """
        parameters = dict(model.named_parameters())
        rule_of = {name: next((r for r in self.rules if fnmatchcase(name, r.match)), None) for name in parameters}
        for index, rule in enumerate(self.rules):
            if not any(applied is rule for applied in rule_of.values()):
                raise UserError(f"{_KEY}.rules.{index} ({rule.match!r}) {_why_unused(rule.match, list(parameters))}")
        factors = self._decay_factors(model)
        assigned = {
            name: ParameterSettings(
                lr_factor=factors[name] * ((rule.lr_factor if rule else None) or 1.0),
                weight_decay=rule.weight_decay if rule else None,
                adapt=rule.adapt if rule else None,
                frozen=(rule.freeze if rule else False) or not parameters[name].requires_grad,
                until_step=rule.until_step if rule else None,
            )
            for name, rule in rule_of.items()
        }
        if assigned and all(settings.frozen for settings in assigned.values()):
            raise UserError(f"{_KEY}.rules freeze every parameter: at step 0 there is nothing to train")
        return assigned

    def freeze(self, model: nn.Module) -> None:
        """Freeze what rules freeze, ``until_step`` or throughout. Call this before wrapping an optimizer.

        Raises:
            UserError: See ``assign``.
        """
        assigned = self.assign(model)
        for name, parameter in model.named_parameters():
            if assigned[name].frozen:
                parameter.requires_grad_(False)

    def groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer, one for each distinct setting, without what is never trained.

        Each group has ``params`` and ``lr``, and ``weight_decay`` and ``adapt`` where a rule sets them.
        """
        assigned = self.assign(model)
        groups: dict[ParameterSettings, dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            settings = assigned[name]
            if not settings.is_trained:
                continue
            group = groups.setdefault(settings, {"params": [], "lr": lr * settings.lr_factor})
            group["params"].append(parameter)
            if settings.weight_decay is not None:
                group["weight_decay"] = settings.weight_decay
            if settings.adapt is not None:
                group["adapt"] = settings.adapt
        return list(groups.values())

    def unfreezing(self, model: nn.Module) -> dict[int, list[nn.Parameter]]:
        """Return the parameters that are frozen until a step, by that step."""
        assigned = self.assign(model)
        parameters_at: dict[int, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if (step := assigned[name].until_step) is not None:
                parameters_at.setdefault(step, []).append(parameter)
        return parameters_at

    def _decay_factors(self, model: nn.Module) -> dict[str, float]:
        names = [name for name, _ in model.named_parameters()]
        if self.decay == 1:
            return dict.fromkeys(names, 1.0)
        depths = layer_depths(model) if self.order is None else _depths_in_order(self.order, names)
        deepest = max(depths.values())
        return {name: self.decay ** (deepest - depths[name]) for name in names}


def _build_rule(spec: Any, key: str) -> LayerRule:
    if isinstance(spec, LayerRule):
        return spec
    if not isinstance(spec, Mapping):
        raise UserError(f"{key}={spec!r} should be a section with keys {', '.join(LayerRule.model_fields)}")
    return validate(LayerRule, spec, key)


def _depths_in_order(order: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Return the index of the first pattern that matches each name."""
    depths = {
        name: next((index for index, pattern in enumerate(order) if fnmatchcase(name, pattern)), None) for name in names
    }
    for index, pattern in enumerate(order):
        if index not in depths.values():
            raise UserError(f"{_KEY}.order.{index} ({pattern!r}) {_why_unused(pattern, names)}")
    if missing := [name for name, depth in depths.items() if depth is None]:
        raise UserError(f"{_KEY}.order has no layer for {missing[0]!r}: add a pattern that matches it")
    return {name: depth for name, depth in depths.items() if depth is not None}


def _why_unused(pattern: str, names: Sequence[str]) -> str:
    if any(fnmatchcase(name, pattern) for name in names):
        return "has no effect: earlier patterns match all of its parameters"
    nearest = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
    return f"matches no parameter; the nearest name is {nearest[0]!r}" if nearest else "matches no parameter"
