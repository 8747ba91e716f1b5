"""The summary of step times and the files written; no worker is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.results import write_result
from benchmarks.speed import step_time
from benchmarks.speed.worker_group import WorkerError

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


def test_many_compressors_are_split_between_groups() -> None:
    every = [{"name": str(number)} for number in range(5)]
    settings = {"at_once": 2, "compressors": every, "hooks": ["none", "fp16"], "bucket_mb": None}
    parts = step_time.split_settings(settings)
    assert [part["compressors"] for part in parts] == [every[:2], every[2:4], every[4:], []]
    assert [part["hooks"] for part in parts] == [["none"], ["none"], ["none"], ["none", "fp16"]]
    assert step_time.split_settings({**settings, "hooks": ["none"]}) == [
        {**part, "hooks": ["none"]} for part in parts[:3]
    ]


def test_groups_that_train_differently_are_refused() -> None:
    ours, theirs = [{"loss": 1.0, "parameters": 5.0}], [{"loss": 1.0, "parameters": 5.1}]
    step_time.check_same_results(ours, ours)
    with pytest.raises(WorkerError, match="parameters"):
        step_time.check_same_results(ours, theirs)


def test_results_are_written_beside_earlier_ones(tmp_path: Path) -> None:
    table = step_time.tabulate(RESULT["rows"], RESULT["workers"], "adamw")
    first = write_result(table, RESULT, tmp_path, "step-time", "try")
    second = write_result(table, RESULT, tmp_path, "step-time", "try")
    assert first != second
    assert json.loads(first.with_suffix(".json").read_text()) == RESULT
    assert second.with_suffix(".json").exists()
    assert "4 workers with adamw" in first.read_text()
    assert "0.839 - 0.887" in first.read_text()
    assert "topk, ratio=0.01" in first.read_text()
    assert "python x" in first.read_text()


def test_a_result_is_summarized_by_its_best_and_worst_ratio() -> None:
    baseline = {**ROW, "who": "ddp", "setting": {"name": "none"}, "ratio": 1.0}
    dense = {**ROW, "setting": {"name": "dense"}, "ratio": 0.95}
    text = step_time.summarize_result({"rows": [baseline, dense, ROW]})
    assert text == "mlp, gloo, 1gbit links: 0.853 (topk, ratio=0.01) to 0.950 (dense) of ddp's step"
    text = step_time.summarize_result({"settings": {"optimizer": "adamw"}, "rows": [baseline, dense]})
    assert text == "mlp with adamw, gloo, 1gbit links: 0.950 (dense) of ddp's step"
