"""Whole runs with parameters that rules freeze until a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.comm import SingleProcess, simulate
from disttrain.errors import UserError
from disttrain.training.trainer import Trainer
from tests.support.runs import make_config, records, stop_run, train
from tests.unit.training.monitoring.test_early_stopping import STOPPING

UNTIL = 4
LAYERS: dict[str, Any] = {
    "rules": [
        {"match": "0.weight", "freeze": True, "until_step": UNTIL, "lr_factor": 0.5},
        {"match": "0.bias", "freeze": True, "until_step": UNTIL + 2},
    ]
}


def changes_of(trainer: Trainer, before: dict[str, torch.Tensor]) -> set[str]:
    now = trainer.model.state_dict()
    return {name for name, value in before.items() if not torch.equal(now[name], value)}


def test_parameters_are_trained_from_their_step_on(tmp_path: Path) -> None:
    seen: list[tuple[int, set[str]]] = []
    before: dict[str, torch.Tensor] = {}

    def watch(trainer: Trainer) -> None:
        if before:
            seen.append((trainer.progress.step - 1, changes_of(trainer, before)))
        before.update({name: value.clone() for name, value in trainer.model.state_dict().items()})

    train(make_config(tmp_path, layers=LAYERS), SingleProcess(), watch)
    head = {"3.weight", "3.bias"}
    assert len(seen) == 8
    for step, changed in seen:
        assert changed == head | ({"0.weight"} if step >= UNTIL else set()) | (
            {"0.bias"} if step >= UNTIL + 2 else set()
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_norm": 0.05, "accumulation": 2},
        {"optimizer": {"name": "adamw", "lr": 0.01}},
        {"optimizer": {"name": "lamb", "lr": 0.01}, "clip_value": 0.02},
        {"optimizer": {"name": "lars", "lr": 0.1, "l1": 1e-3}},
    ],
)
def test_ranks_equal_one_process(tmp_path: Path, changes: dict[str, Any]) -> None:
    alone = make_config(tmp_path / "alone", layers=LAYERS, **changes)
    _, expected = train(alone, SingleProcess())
    together = make_config(tmp_path / "together", layers=LAYERS, **changes)
    for _, model in simulate(4, lambda comm: train(together, comm)):
        for name, value in expected.items():
            torch.testing.assert_close(model[name], value, rtol=0, atol=1e-10)


TOPK: dict[str, Any] = {"name": "topk", "ratio": 0.2, "min_numel": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "topk": {"compressor": TOPK},
    "powersgd": {"compressor": {"name": "powersgd", "rank": 1, "min_numel": 1}},
    "growing batch": {
        "compressor": TOPK,
        "batch_size": 4,
        "batch": {"name": "noise_scale", "max_batch_size": 40, "min_measurements": 2, "smoothing": 0.5},
        "epochs": 2,
    },
}


@pytest.mark.parametrize("stop_at", [UNTIL, UNTIL + 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_with_unfreezing_average_and_early_stopping_equals_an_uninterrupted_run_bit_for_bit(
    tmp_path: Path, stop_at: int, variant: str
) -> None:
    changes: dict[str, Any] = {
        "layers": LAYERS,
        "average": {"decay": 0.6},
        "early_stopping": STOPPING,
        "evaluation": {"every_steps": 2},
        "checkpoint": {"every_steps": 1, "keep": 1},
        "task": {"num_samples": 52},
        **VARIANTS[variant],
    }

    reference = make_config(tmp_path / "reference", **changes)
    expected = simulate(2, lambda comm: train(reference, comm))
    config = make_config(tmp_path / "stopped", **changes, resume="auto")
    stop_run(config, 2, stop_at)
    for (summary, model), (expected_summary, expected_model) in zip(
        simulate(2, lambda comm: train(config, comm)), expected, strict=True
    ):
        assert all(torch.equal(model[name], value) for name, value in expected_model.items())
        for key in ("steps", "metrics", "best", "wire"):
            assert summary[key] == expected_summary[key]
    losses = [[record.get("loss") for record in records(run)] for run in (config, reference)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"match": "0.*", "until_step": 3}, r"layers.rules \('0\.\*'\) has until_step without freeze"),
        ({"match": "0.*", "freeze": True, "until_step": 0}, "layers.rules.0.until_step=0 should be greater than"),
        ({"match": "0.*", "freeze": True, "until_step": 9}, "until_step=9 is never reached, the run has 9 steps"),
        (
            {"match": "*", "freeze": True, "until_step": 2},
            "freeze every parameter: at step 0 there is nothing to train",
        ),
        ({"match": "hed.*", "freeze": True, "until_step": 2}, r"layers.rules.0 \('hed\.\*'\) matches no parameter"),
    ],
)
def test_impossible_rules_are_refused_in_one_line(tmp_path: Path, rule: dict[str, Any], message: str) -> None:
    def run() -> None:
        config = make_config(tmp_path, layers={"rules": [rule]})
        simulate(2, lambda comm: train(config, comm))

    with pytest.raises(UserError, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)


def test_a_compression_rule_may_match_parameters_that_are_unfrozen_later(tmp_path: Path) -> None:
    rules = [{"match": "0.weight", "use": {"name": "topk", "min_numel": 1}}]
    config = make_config(tmp_path, layers=LAYERS, compressor={"name": "dense", "rules": rules})
    (summary, _), _ = simulate(2, lambda comm: train(config, comm))
    assert summary["wire"]["by_compressor"]["topk"]["dense_bytes"] == (9 - UNTIL) * 6 * 8 * 4


def test_another_number_of_ranks_resumes_with_the_same_frozen_set(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"layers": LAYERS, "average": {"decay": 0.6}, "checkpoint": {"every_steps": 1}}
    _, expected = train(make_config(tmp_path / "alone", **changes), SingleProcess())

    config = make_config(tmp_path / "stopped", **changes, resume="auto")
    stop_run(config, 2, UNTIL + 1)
    for _, model in simulate(3, lambda comm: train(config, comm)):
        for name, value in expected.items():
            torch.testing.assert_close(model[name], value, rtol=0, atol=1e-10)
