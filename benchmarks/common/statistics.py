"""Summaries of measurements: ratios to a baseline with their intervals, and runs grouped over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

Run = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Ratio:
    """The ratio of two step times, measured in several turns.

    Attributes:
        median: over turns.
        low, high: 95 % interval of the median.
        values: the ratio in each turn.
    """

    median: float
    low: float
    high: float
    values: np.ndarray


def ratio_to_baseline(seconds: ArrayLike, baseline: ArrayLike) -> Ratio:
    """Compare the median step of each turn with the baseline's median step in the same turn.

    Args:
        seconds: step times, one row for each turn; a flat sequence has one value for each turn.
        baseline: the baseline's step times in the same turns.
    """
    values = _median_of_turns(seconds) / _median_of_turns(baseline)
    low, high = interval_of_median(values)
    return Ratio(float(np.median(values)), low, high, values)


def interval_of_median(values: np.ndarray, num_draws: int = 4000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    draws = np.random.default_rng(0).choice(values, size=(num_draws, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class SeedSummary:
    """Runs that differ only in their seed, and the metric of each."""

    runs: list[Run]
    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def spread(self) -> float:
        """The difference between the largest and the smallest value."""
        return max(self.values) - min(self.values)


def summarize_seeds(
    runs: Sequence[Run], key: Callable[[Run], Key], metric: Callable[[Run], float]
) -> dict[Key, SeedSummary]:
    """Group runs by ``key``, in order of first appearance."""
    groups: dict[Key, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return {name: SeedSummary(group, [metric(run) for run in group]) for name, group in groups.items()}


def _median_of_turns(seconds: ArrayLike) -> np.ndarray:
    values = np.asarray(seconds, dtype=float)
    medians: np.ndarray = np.median(values.reshape(len(values), -1), axis=1)
    return medians
