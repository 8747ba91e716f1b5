from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.comm import Communicator, SingleProcess, simulate
from disttrain.errors import UserError
from disttrain.training.config import Config
from disttrain.training.monitoring.early_stopping import EarlyStopper, EarlyStopping
from disttrain.training.trainer import Trainer
from tests.support.runs import make_config, records, stop_run, train

STOPPING: dict[str, Any] = {"metric": "error", "mode": "min", "patience": 2, "restore_best": True}


def watch(values: list[float], **options: Any) -> tuple[int | None, EarlyStopper]:
    """At which evaluation (from 1) a run with these values ends."""
    stopper = EarlyStopper(EarlyStopping(**{"metric": "x", "mode": "min", "patience": 2, **options}))
    for step, value in enumerate(values, 1):
        stopper.observe(step, {"x": value}, nn.Linear(1, 1))
        if stopper.should_stop:
            return step, stopper
    return None, stopper


@pytest.mark.parametrize(
    ("values", "options", "end", "best"),
    [
        ([5, 4, 4, 4], {}, 4, (4, 2)),
        ([5, 4, 4.5, 3, 3.5, 3], {}, 6, (3, 4)),
        ([5, 4, 4.5, 3, 3.5, 3, 2], {"patience": 3}, None, (2, 7)),
        ([5, 4.95, 4.94], {"min_delta": 0.1}, 3, (5, 1)),
        ([1, 2, 3, 2.5, 2], {"mode": "max"}, 5, (3, 3)),
        ([math.nan, 3, math.nan, math.inf], {}, 4, (3, 2)),
        ([math.nan, math.nan], {}, 2, (None, 0)),
        ([3, 4], {"patience": 1}, 2, (3, 1)),
    ],
)
def test_the_run_ends_when_patience_does(
    values: list[float], options: dict[str, Any], end: int | None, best: tuple[float | None, int]
) -> None:
    ended, stopper = watch(values, **options)
    assert ended == end
    shown = stopper.summary()["best"]
    assert (shown["value"], shown["step"]) == best


def diverging(output: Path, **changes: Any) -> Config:
    """A rate that rises until the held-out error does: the best evaluation is neither the first nor the last."""
    values = {
        "optimizer": {"name": "sgd", "lr": 0.9, "momentum": 0.9},
        "schedule": {"name": "constant", "warmup_steps": 20},
        "evaluation": {"every_epochs": None, "every_steps": 2},
        "checkpoint": {"every_steps": 1, "keep": 2},
        "early_stopping": STOPPING,
        "epochs": 40,
        **changes,
    }
    return make_config(output, **values)


def errors(config: Config) -> dict[int, float]:
    return {record["step"]: record["error"] for record in records(config) if record["kind"] == "evaluation"}


@pytest.mark.parametrize("average", [None, {"decay": 0.5}], ids=["weights", "average"])
def test_all_ranks_stop_at_the_same_step_and_restore_the_best_weights(tmp_path: Path, average: Any) -> None:
    def run(config: Config, comm: Communicator) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, float]]:
        trainer = Trainer(config, comm)
        try:
            summary = trainer.run()
            return summary, trainer.model.state_dict(), trainer.evaluator.run()
        finally:
            trainer.close()

    config = diverging(tmp_path, average=average)
    results = simulate(2, lambda comm: run(config, comm))
    found = errors(config)
    best_step = min(found, key=lambda step: found[step])
    for summary, weights, measured in results:
        assert summary["ended_by"] == "early_stopping"
        assert summary["steps"] == max(found) == best_step + 2 * 2 < 120
        assert best_step > 2
        assert summary["best"] == {"metric": "error", "value": found[best_step], "step": best_step, "restored": True}
        assert summary["metrics"] == measured == {"error": found[best_step]}
        assert all(torch.equal(value, results[0][1][name]) for name, value in weights.items())
    assert json.loads((config.directory / "summary.json").read_text()) == results[0][0]


def test_one_process_and_ranks_stop_at_the_same_step(tmp_path: Path) -> None:
    alone, _ = train(diverging(tmp_path / "alone"), SingleProcess())
    together = diverging(tmp_path / "together")
    for summary, _ in simulate(3, lambda comm: train(together, comm)):
        assert summary["steps"] == alone["steps"]
        assert summary["best"]["step"] == alone["best"]["step"]
        assert summary["metrics"]["error"] == pytest.approx(alone["metrics"]["error"], abs=1e-10)


@pytest.mark.parametrize("stop_at", [3, 6, 9])
def test_resuming_with_an_average_and_early_stopping_equals_no_stop_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    changes: dict[str, Any] = {
        "average": {"decay": 0.6, "after_steps": 1},
        "compressor": {"name": "topk", "ratio": 0.3, "min_numel": 1},
        "task": {"batch_norm": True, "num_samples": 52},
        "clip_value": 0.5,
    }

    reference = diverging(tmp_path / "reference", **changes)
    expected = simulate(2, lambda comm: train(reference, comm))
    assert expected[0][0]["ended_by"] == "early_stopping"
    assert expected[0][0]["steps"] > stop_at
    config = diverging(tmp_path / "stopped", **changes, resume="auto")
    stop_run(config, 2, stop_at)
    for _ in range(2):  # resume the stopped run, and then the one that has ended
        for (summary, model), (expected_summary, expected_model) in zip(
            simulate(2, lambda comm: train(config, comm)), expected, strict=True
        ):
            for key in ("steps", "metrics", "best", "ended_by"):
                assert summary[key] == expected_summary[key], key
            assert all(torch.equal(model[name], value) for name, value in expected_model.items())
        assert errors(config) == errors(reference)


def test_more_patience_lets_a_run_continue(tmp_path: Path) -> None:
    summary, _ = train(diverging(tmp_path), SingleProcess())
    patient = {**STOPPING, "patience": 4}
    longer, _ = train(diverging(tmp_path, early_stopping=patient, resume="auto"), SingleProcess())
    assert longer["steps"] > summary["steps"]
    fresh, _ = train(diverging(tmp_path, early_stopping=patient), SingleProcess())
    assert (longer["steps"], longer["best"], longer["metrics"]) == (fresh["steps"], fresh["best"], fresh["metrics"])


def test_another_metric_resets_early_stopping(tmp_path: Path) -> None:
    train(diverging(tmp_path, schedule="constant", max_steps=4), SingleProcess())
    changes: dict[str, Any] = {"schedule": "constant", "max_steps": 8, "resume": "auto"}
    summary, _ = train(diverging(tmp_path, early_stopping={**STOPPING, "mode": "max"}, **changes), SingleProcess())
    assert summary["best"]["step"] > 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"early_stopping": {**STOPPING, "metric": "eror"}},
            "early_stopping.metric='eror' is not a metric of the task; did you mean 'error'",
        ),
        ({"task": {"num_held_out": 0}}, "the task has none"),
        ({"evaluation": {"every_epochs": None}}, "set evaluation.every_epochs or evaluation.every_steps"),
        ({"early_stopping": {"metric": "error"}}, "missing key 'early_stopping.mode': whether smaller or larger"),
        ({"early_stopping": {**STOPPING, "mode": "mim"}}, "unknown early_stopping.mode 'mim'; did you mean 'min'"),
        ({"early_stopping": {**STOPPING, "patience": 0}}, "early_stopping.patience=0 should be greater than"),
        ({"early_stopping": {**STOPPING, "delta": 0}}, "unknown key 'early_stopping.delta'"),
        ({"average": {"decay": 1.0}}, "average.decay=1.0 should be less than 1"),
        ({"clip_value": 0.0}, "clip_value=0.0 should be greater than 0"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    def run() -> None:
        config = diverging(tmp_path, **changes)
        simulate(2, lambda comm: train(config, comm))

    with pytest.raises(UserError, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)
