"""Summaries of measurements."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.common.statistics import interval_of_median, ratio_to_baseline, summarize_seeds


def test_the_interval_contains_the_median_and_narrows_with_more_turns() -> None:
    values = np.random.default_rng(1).normal(1.0, 0.1, 400)
    low, high = interval_of_median(values)
    assert low <= np.median(values) <= high
    few_low, few_high = interval_of_median(values[:10])
    assert high - low < few_high - few_low


def test_ratios_compare_medians_within_each_turn() -> None:
    ratio = ratio_to_baseline([[1.0, 1.0, 9.0], [3.0, 3.0, 3.0], [4.0, 4.0, 4.0]], [[2.0, 2.0, 2.0]] * 3)
    assert ratio.values.tolist() == [0.5, 1.5, 2.0]
    assert ratio.median == 1.5
    assert 0.5 <= ratio.low <= ratio.median <= ratio.high <= 2.0


def test_one_value_for_each_turn_is_enough() -> None:
    assert ratio_to_baseline([1.0, 2.0], [2.0, 2.0]).values.tolist() == [0.5, 1.0]


def test_runs_are_grouped_over_seeds() -> None:
    runs = [{"lr": lr, "seed": seed, "loss": lr + seed} for lr in (2, 1) for seed in (0, 1)]
    groups = summarize_seeds(runs, key=lambda run: run["lr"], metric=lambda run: float(run["loss"]))
    assert list(groups) == [2, 1]
    assert groups[1].runs == runs[2:]
    assert groups[1].values == [1.0, 2.0]
    assert groups[1].mean == pytest.approx(1.5)
    assert groups[1].spread == pytest.approx(1.0)
