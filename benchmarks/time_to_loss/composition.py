"""Seconds to a loss, composed of a loss curve, the kinds of its steps, and the times of steps of each kind."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.speed.frameworks import POWERSGD_START

DENSE, REFRESH, COMPRESSED = "dense", "refresh", "compressed"
DENSE_FRACTION = 0.5
"""A step that sends at least this fraction of the gradients' elements without the setting's compressors is dense."""
SHORT_WARMUP = 5
"""Dense steps of a variant whose compressed steps are timed."""
ALWAYS = 10**9


@dataclass(frozen=True)
class Variant:
    """A framework, ``ddp`` or ``disttrain``, with a hook or a compressor, as JSON so that it can be a key."""

    who: str
    spec: str

    @classmethod
    def of(cls, who: str, setting: Mapping[str, Any]) -> Variant:
        return cls(who, json.dumps(setting))

    @property
    def setting(self) -> dict[str, Any]:
        setting: dict[str, Any] = json.loads(self.spec)
        return setting

    @property
    def group(self) -> str:
        """Variants of the same group may share processes."""
        return "hooks" if self.who == "ddp" and self != BASELINE else self.who

    @property
    def trains_as(self) -> Variant:
        """The variant whose loss curve it has.

        ``overlap_step`` only moves work. DDP's arithmetic is that of disttrain's dense training, and rounding to half
        precision makes no difference that one run shows (docs/compressors.md).
        """
        setting = {key: value for key, value in self.setting.items() if key != "overlap_step"}
        is_dense = setting in ({"name": "none"}, {"name": "fp16"}, {"name": "bf16"})
        return OWN_DENSE if is_dense else Variant.of(self.who, setting)


BASELINE = Variant.of("ddp", {"name": "none"})
OWN_DENSE = Variant.of("disttrain", {"name": "dense"})


def compressed_by(setting: Mapping[str, Any]) -> set[str]:
    """Return the names of the compressors of a setting of disttrain, those of its rules included, without ``dense``."""
    uses = [rule["use"] for rule in setting.get("rules", [])]
    return {setting["name"], *(use if isinstance(use, str) else use["name"] for use in uses)} - {"dense"}


def find_kinds(variant: Variant, dense_fractions: Sequence[float | None]) -> list[str]:
    """Return the kind of each step: dense, compressed, or a refresh, which is dense after compressed ones.

    Args:
        variant: decides for DDP, where what is sent is not known: only its PowerSGD hook starts dense.
        dense_fractions: for each step from the first on, the fraction of elements that were sent dense.
    """
    if variant.who == "ddp":
        setting = variant.setting
        start = {"none": math.inf, "powersgd": setting.get("start", POWERSGD_START)}.get(setting["name"], 0)
        return [DENSE if step < start else COMPRESSED for step in range(len(dense_fractions))]
    kinds = []
    dense = DENSE
    for fraction in dense_fractions:
        assert fraction is not None
        if fraction >= DENSE_FRACTION:
            kinds.append(dense)
        else:
            kinds.append(COMPRESSED)
            dense = REFRESH
    return kinds


def forms_of(variant: Variant) -> list[Variant]:
    """Return the variants to time for the kinds of steps of one: itself, or always dense and soon compressed."""
    setting = variant.setting
    key = "start" if variant.who == "ddp" else "dense_steps"
    whiten = setting.get("whiten")
    if not setting.get(key) and not whiten:
        return [variant]
    soon = {**setting, key: min(setting.get(key, 0), SHORT_WARMUP)}
    if whiten:
        options = {} if whiten is True else whiten
        # Refreshes at step 8, 12, 18, ...: some of each kind are timed.
        soon["whiten"] = {**options, "warmup_steps": SHORT_WARMUP, "refresh_growth": 0.5}
    return [Variant.of(variant.who, form) for form in ({**setting, key: ALWAYS}, soon)]


def first_step_at(evaluations: Sequence[Sequence[float | None]], target: float) -> float | None:
    """Return the step at which the loss first reaches ``target``, linearly between evaluations; None if never.

    Args:
        evaluations: the first value of each is the step, the last one the loss, None if it is not finite.
        target: in the unit of the loss.
    """
    before: tuple[float, float] | None = None
    for step, *_, loss in evaluations:
        assert step is not None
        if loss is not None and loss <= target:
            if before is None or before[1] == loss:
                return float(step)
            fraction = (before[1] - target) / (before[1] - loss)
            return before[0] + fraction * (step - before[0])
        before = None if loss is None else (float(step), loss)
    return None


def cumulate(kinds: Sequence[str], seconds: Mapping[str, float]) -> np.ndarray:
    """Return the seconds after 0, 1, ... steps of the given kinds."""
    return np.concatenate([[0.0], np.cumsum([seconds[kind] for kind in kinds])])


def seconds_at(kinds: Sequence[str], seconds: Mapping[str, float], step: float) -> float:
    """Return the seconds of the first ``step`` steps; a part of a step takes this part of its time."""
    total = cumulate(kinds, seconds)
    return float(np.interp(step, np.arange(len(total)), total))


def median_seconds(times: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, float]:
    """Return the median seconds of each kind over all turns."""
    return {kind: float(np.median(list(itertools.chain(*turns)))) for kind, turns in times.items()}


def seconds_by_turn(
    times: Mapping[str, Sequence[Sequence[float]]], kinds: Sequence[str], dense_seconds: Sequence[Mapping[str, float]]
) -> list[dict[str, float]]:
    """Return for each turn the median seconds of each kind in ``kinds``.

    A turn without a step of a kind takes the median over all turns. A kind that was never timed, such as a refresh that
    is rare, takes the time of a dense step of this variant, or else of ``dense_seconds``, those of disttrain's dense.
    """
    overall = median_seconds(times)
    num_turns = len(dense_seconds)
    by_turn = []
    for turn in range(num_turns):
        its = {kind: float(np.median(turns[turn])) if turns[turn] else overall[kind] for kind, turns in times.items()}
        for kind in dict.fromkeys(kinds):
            its.setdefault(kind, its.get(DENSE, dense_seconds[turn][DENSE]))
        by_turn.append(its)
    return by_turn
