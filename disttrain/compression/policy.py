"""Which compressor exchanges which parameter, and from which step on."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from pydantic import Field, SerializeAsAny, field_validator

from disttrain.compression.algorithms.dense import Dense
from disttrain.compression.base import Bucket, Compressor, registry
from disttrain.compression.whitening import Whitening
from disttrain.errors import UserError
from disttrain.validation import Section, keys_of, unknown_key, validate

POLICY_KEYS = ("rules", "dense_steps", "dense_as", "whiten")
"""Keys of a compressor's section beside the compressor's own options."""
_KEY = registry.key

Shape = tuple[int, ...]


class Rule(Section):
    """Assigns a compressor to the parameters of some names and sizes."""

    match: str = Field(default="*", min_length=1, description="a shell pattern of parameter names: 'embedding.*'")
    min_numel: int = Field(default=0, ge=0, description="only parameters of at least this many elements")
    use: SerializeAsAny[Compressor] = Field(description="a compressor's name, or a section with its name and options")

    @classmethod
    def build(cls, spec: Any, key: str) -> Rule:
        """Return a rule from a rule or a mapping. ``key`` is its place in the config, for messages.

        Raises:
            UserError: it is not a mapping, or a key or value in it is wrong.
        """
        if isinstance(spec, Rule):
            return spec
        if not isinstance(spec, Mapping):
            raise UserError(f"{key}={spec!r} should be a section with keys {', '.join(cls.model_fields)}")
        if "use" in spec:
            spec = {**spec, "use": registry.build(spec["use"], f"{key}.use")}
        return validate(cls, spec, key)

    def applies(self, name: str, shape: Shape) -> bool:
        return fnmatchcase(name, self.match) and math.prod(shape) >= self.min_numel

    def __str__(self) -> str:
        return f"{{match: {self.match!r}, min_numel: {self.min_numel}}}" if self.min_numel else repr(self.match)


class Policy(Section):
    """A compressor for all parameters, rules for some of them, dense steps, and whitening.

    The first rule that applies to a parameter decides; all other parameters use ``compressor``. Parameters that the
    chosen compressor does not accept are sent dense in each step.
    """

    compressor: SerializeAsAny[Compressor]
    rules: tuple[Rule, ...] = Field(default=(), description="the first one that applies to a parameter decides")
    dense_steps: int = Field(default=0, ge=0, description="initial steps that send all gradients dense")
    dense_as: SerializeAsAny[Compressor] = Field(
        default=Dense(), description="how all that is dense is sent: dense, bf16, fp16, or others without state"
    )
    whiten: Whitening | None = Field(
        default=None, description="true, or a section: compress in units of the root of the optimizer's second moment"
    )

    @field_validator("rules", mode="before")
    @classmethod
    def _build_rules(cls, rules: Any) -> tuple[Rule, ...]:
        if not isinstance(rules, Sequence) or isinstance(rules, str):
            raise UserError("should be a list of rules, such as [{match: '*.bias', use: dense}]")
        return tuple(Rule.build(rule, f"{_KEY}.rules.{index}") for index, rule in enumerate(rules))

    @field_validator("dense_as", mode="before")
    @classmethod
    def _build_dense_as(cls, spec: Any) -> Compressor:
        chosen = registry.build(spec, f"{_KEY}.dense_as")
        probe = Bucket(("probe",), ((64, 64),), torch.float32, torch.device("cpu"), world_size=4)
        if chosen.init_state(probe).tensors:
            raise UserError(
                f"should keep no state, as dense steps send gradients alone: {registry.name_of(chosen)} has "
                f"{', '.join(chosen.init_state(probe).tensors)}"
            )
        return chosen

    @field_validator("whiten", mode="before")
    @classmethod
    def _build_whitening(cls, spec: Any) -> Any:
        return {True: Whitening(), False: None}[spec] if isinstance(spec, bool) else spec

    @classmethod
    def build(cls, spec: Policy | Compressor | str | Mapping[str, Any]) -> Policy:
        """Return a policy from a policy, a compressor or its name, or a mapping as in a config.

        The mapping has the compressor's ``name`` and options, and may have the keys of this class.

        Raises:
            UserError: an unknown name or option, or a value out of bounds.
        """
        if isinstance(spec, Policy):
            return spec
        if not isinstance(spec, Mapping):
            return cls(compressor=registry.build(spec))
        if isinstance(name := spec.get("name"), str):
            known = ["name", *keys_of(registry.get(name)), *POLICY_KEYS]
            dotted = [f"{_KEY}.{key}" for key in known]
            odd = [unknown_key(f"{_KEY}.{key}", value, dotted) for key, value in spec.items() if key not in known]
            if odd:
                raise UserError("; ".join(odd))
        own = {key: value for key, value in spec.items() if key in POLICY_KEYS}
        chosen = registry.build({key: value for key, value in spec.items() if key not in POLICY_KEYS})
        return validate(cls, {"compressor": chosen, **own}, _KEY)

    @property
    def hierarchical(self) -> bool:
        """Whether some parameters may be exchanged hierarchically."""
        return any(compressor.hierarchical for compressor in (self.compressor, *(rule.use for rule in self.rules)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, from which ``build`` makes the same policy."""
        rules = [{**rule.model_dump(mode="json"), "use": registry.dump(rule.use)} for rule in self.rules]
        return {
            **registry.dump(self.compressor),
            "rules": rules,
            "dense_steps": self.dense_steps,
            "dense_as": registry.dump(self.dense_as),
            "whiten": None if self.whiten is None else self.whiten.model_dump(mode="json"),
        }

    def assign(self, shapes: Mapping[str, Shape]) -> list[Compressor]:
        """Return the compressor of each parameter: Dense for those that the chosen one does not accept.

        Args:
            shapes: shapes of the parameters by name.

        Raises:
            UserError: a rule decides for no parameter, or a compressor suits none of its parameters.
        """
        deciding = {name: self._deciding(name, shape) for name, shape in shapes.items()}
        for index, rule in enumerate(self.rules):
            if not any(decided is rule for decided in deciding.values()):
                raise UserError(f"{_KEY}.rules.{index} ({rule}) {self._why_idle(rule, shapes)}")
        chosen = {name: rule.use if rule else self.compressor for name, rule in deciding.items()}
        for compressor in dict.fromkeys(chosen.values()):
            compressor.check([shapes[name] for name, its in chosen.items() if its == compressor])
        return [
            chosen[name] if chosen[name].accepts(shape) and math.prod(shape) > 0 else self._dense_instead(chosen[name])
            for name, shape in shapes.items()
        ]

    def is_dense(self, compressor: Compressor) -> bool:
        """Whether a parameter's compressor is what dense gradients are sent by, so that they need no whitening."""
        return compressor.is_lossless or compressor == self._dense_instead(compressor)

    def _dense_instead(self, compressor: Compressor) -> Compressor:
        """Return the compressor of the parameters that ``compressor`` does not accept."""
        if isinstance(compressor, Dense):
            return compressor
        return self.dense_as.model_copy(update={"hierarchical": compressor.hierarchical})

    def _deciding(self, name: str, shape: Shape) -> Rule | None:
        return next((rule for rule in self.rules if rule.applies(name, shape)), None)

    def _why_idle(self, rule: Rule, shapes: Mapping[str, Shape]) -> str:
        if any(rule.applies(name, shape) for name, shape in shapes.items()):
            return "never decides: earlier rules apply to all parameters that it matches"
        of_name = [name for name in shapes if fnmatchcase(name, rule.match)]
        if of_name:
            largest = max(of_name, key=lambda name: math.prod(shapes[name]))
            return (
                f"matches no trained parameter: the largest is {largest!r} with {math.prod(shapes[largest])} elements"
            )
        nearest = difflib.get_close_matches(rule.match, shapes, n=1, cutoff=0.0)[0]
        return f"matches no trained parameter; the nearest name is {nearest!r}"
