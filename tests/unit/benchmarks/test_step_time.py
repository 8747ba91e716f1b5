"""The bench's arithmetic and what it writes; no worker is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from benchmarks.machine import show_and_write
from benchmarks.teams import TeamError

from benchmarks import step_time

ROW: dict[str, Any] = {
    "rate": "1gbit", "model": "mlp", "engine": "gloo", "who": "disttrain", "setting": {"name": "topk", "ratio": 0.01},
    "ratio": 0.853, "ratio_low": 0.839, "ratio_high": 0.887, "milliseconds": 604.0, "cpu_milliseconds": 173.0,
    "sent_bytes": 840_000,
}  # fmt: skip
RESULT: dict[str, Any] = {
    "machine": {
        "date": "2026-01-02T03:04:05+00:00", "revision": "abc", "cores": 2, "memory_gib": 4.0, "processor": "some",
        "kernel": "6", "congestion_control": "cubic", "load_average": [0.5, 0.4, 0.3], "command": "python x",
        "versions": {"python": "3.11", "horovod": None},
    },
    "workers": 4,
    "rows": [ROW],
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), [("1gbit", 1000.0), ("2.5gbit", 2500.0), ("100mbit", 100.0)])
def test_rates_are_mbit_per_second(text: str, expected: float) -> None:
    assert step_time.parse_rate(text) == expected


def test_none_leaves_links_unshaped() -> None:
    assert step_time.parse_rate("none") is None


@pytest.mark.parametrize("text", ["fast", "gbit", "0mbit", "-1gbit", "10"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no rate"):
        step_time.parse_rate(text)


def test_compressors_are_read_as_a_config_would_have_them() -> None:
    assert step_time.parse_compressor("dense") == {"name": "dense"}
    assert step_time.parse_compressor("topk:ratio=0.01,mode=x") == {"name": "topk", "ratio": 0.01, "mode": "x"}
    with pytest.raises(typer.BadParameter, match="is no field=value"):
        step_time.parse_compressor("topk:ratio")


def test_many_compressors_are_split_between_teams() -> None:
    every = [{"name": str(number)} for number in range(5)]
    settings = {"at_once": 2, "compressors": every, "hooks": ["none", "fp16"], "bucket_mb": None}
    parts = step_time.split(settings)
    assert [part["compressors"] for part in parts] == [every[:2], every[2:4], every[4:], []]
    assert [part["hooks"] for part in parts] == [["none"], ["none"], ["none"], ["none", "fp16"]]
    assert step_time.split({**settings, "hooks": ["none"]}) == [{**part, "hooks": ["none"]} for part in parts[:3]]


def test_variables_are_read_as_pairs() -> None:
    assert step_time.parse_environment(["A=1", "B=x=y"]) == {"A": "1", "B": "x=y"}
    with pytest.raises(typer.BadParameter, match="is no NAME=VALUE"):
        step_time.parse_environment(["A"])


def test_the_interval_holds_the_median_and_narrows_with_more_turns() -> None:
    values = np.random.default_rng(1).normal(1.0, 0.1, 400)
    low, high = step_time.interval_of_median(values)
    assert low <= np.median(values) <= high
    few_low, few_high = step_time.interval_of_median(values[:10])
    assert high - low < few_high - few_low


def test_teams_that_compute_something_else_are_refused() -> None:
    ours, theirs = [{"loss": 1.0, "parameters": 5.0}], [{"loss": 1.0, "parameters": 5.1}]
    step_time.check_same_work(ours, ours)
    with pytest.raises(TeamError, match="parameters"):
        step_time.check_same_work(ours, theirs)


def test_results_are_written_beside_earlier_ones(tmp_path: Path) -> None:
    table = step_time.make_table(RESULT["rows"], RESULT["workers"])
    first = show_and_write(table, RESULT, tmp_path, "step-time", "try")
    second = show_and_write(table, RESULT, tmp_path, "step-time", "try")
    assert first != second
    assert json.loads(first.with_suffix(".json").read_text()) == RESULT
    assert second.with_suffix(".json").exists()
    assert "0.839 - 0.887" in first.read_text()
    assert "topk, 0.01" in first.read_text()
    assert "python x" in first.read_text()
