"""Whole runs with the recipe's schedules, optimizers and layer-wise rates; the commands that show them beforehand."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from disttrain import cli
from disttrain.cli.layer_table import layer_table
from disttrain.cli.schedule_preview import preview, show
from disttrain.comm import SingleProcess, simulate
from disttrain.errors import UserError
from tests.support.runs import make_config, records, stop_run, train, untimed_records

PLATEAU: dict[str, Any] = {"name": "reduce_on_plateau", "patience": 0, "threshold": 0.05, "gamma": 0.5}
RESUMED: dict[str, dict[str, Any]] = {
    "plateau of the epoch's loss": {"schedule": {**PLATEAU, "threshold": 0.4}},
    "plateau of some steps' loss": {"schedule": {**PLATEAU, "by": "step", "every": 2}},
    "plateau of a metric": {"schedule": {**PLATEAU, "metric": "error"}, "evaluation": {"every_steps": 2}},
    "one cycle": {"schedule": {"name": "one_cycle"}, "optimizer": {"name": "rmsprop", "lr": 0.01, "l1": 0.001}},
    "sequence": {
        "schedule": {"name": "sequence", "parts": [{"name": "linear", "epochs": 1}, {"name": "cosine"}]},
        "optimizer": {"name": "adagrad", "lr": 0.1},
    },
    "lars": {
        "schedule": {"name": "polynomial", "warmup_epochs": 1},
        "optimizer": {"name": "lars", "lr": 1.0, "trust_coefficient": 0.02, "weight_decay": 0.01},
        "layers": {"decay": 0.5, "rules": [{"match": "0.bias", "freeze": True}]},
    },
    "lamb": {"optimizer": {"name": "lamb", "lr": 0.02, "weight_decay": 0.01, "decay_1d": True}},
    "adadelta": {"optimizer": {"name": "adadelta", "weight_decay": 0.01, "decoupled": True}},
    "adam": {"optimizer": {"name": "adam", "lr": 0.01, "amsgrad": True}},
}


@pytest.mark.parametrize("case", RESUMED)
def test_resuming_equals_no_stop_bit_for_bit(tmp_path: Path, case: str) -> None:
    changes = {"epochs": 5, "checkpoint": {"every_steps": 1, "keep": 1}, **RESUMED[case]}

    reference = make_config(tmp_path / "reference", **changes)
    expected = simulate(2, lambda comm: train(reference, comm))
    config = make_config(tmp_path / "stopped", **changes, resume="auto")
    stop_run(config, 2, 8)  # three steps an epoch
    resumed = simulate(2, lambda comm: train(config, comm))
    for (_, model), (_, expected_model) in zip(resumed, expected, strict=True):
        for name, value in expected_model.items():
            assert torch.equal(model[name], value), name
    untimed = untimed_records(config)
    assert untimed == untimed_records(reference)
    rates = [record["lr"] for record in untimed if record["kind"] == "train"]
    if "schedule" in changes:
        assert len(set(rates)) > 2, "the rate changes, before the stop and after it"


def test_the_rate_falls_with_the_epochs_loss_on_all_ranks(tmp_path: Path) -> None:
    """An epoch is judged by the mean over all its samples; a skipped step is left out."""
    schedule = {**PLATEAU, "threshold": 10.0, "threshold_mode": "abs"}  # nothing is ever good enough
    config = make_config(tmp_path, schedule=schedule, epochs=4, task={"bad_step": 4})
    simulate(2, lambda comm: train(config, comm))
    rates = [record["lr"] for record in records(config) if record["kind"] == "train"]
    assert rates == [0.1] * 6 + [0.05] * 3 + [0.025] * 3


def test_trust_ratios_are_logged(tmp_path: Path) -> None:
    config = make_config(tmp_path, optimizer={"name": "lamb", "lr": 0.02}, epochs=1)
    train(config, SingleProcess())
    for record in records(config):
        if record["kind"] == "train":
            assert {key for key in record if key.startswith("trust_ratio/")} == {
                "trust_ratio/0.weight",
                "trust_ratio/3.weight",
            }
            assert record["trust_ratio/0.weight"] > 0


def test_the_rate_is_scaled_to_the_batch(tmp_path: Path) -> None:
    scaling = {"name": "sgd", "lr": 0.1, "lr_scaling": "sqrt", "base_batch_size": 6}
    config = make_config(tmp_path, optimizer=scaling, epochs=1)
    train(config, SingleProcess())
    assert records(config)[0]["lr"] == pytest.approx(0.2)
    linear = config.optimizer.model_copy(update={"lr_scaling": "linear"})
    assert linear.scale(24) == 4


def test_a_metric_that_the_task_lacks_is_refused_on_all_ranks(tmp_path: Path) -> None:
    config = make_config(tmp_path, schedule={**PLATEAU, "metric": "accuracy"})
    with pytest.raises(UserError, match=r"schedule.metric='accuracy' is not a metric of the task"):
        simulate(2, lambda comm: train(config, comm))
    config = make_config(tmp_path, schedule={**PLATEAU, "metric": "error"}, task={"num_held_out": 0})
    with pytest.raises(UserError, match=r"schedule.metric='error' needs held-out data, and the task has none"):
        simulate(2, lambda comm: train(config, comm))


def test_momentum_with_the_rate_and_without_it_are_not_mixed(tmp_path: Path) -> None:
    lars = {"name": "lars", "lr": 1.0}
    train(make_config(tmp_path, optimizer=lars, max_steps=2), SingleProcess())
    config = make_config(tmp_path, optimizer={**lars, "momentum_correction": True}, resume="auto")
    with pytest.raises(
        UserError, match=r"optimizer.momentum_correction=True, but checkpoint .* was saved with False: set"
    ):
        simulate(2, lambda comm: train(config, comm))


@pytest.mark.parametrize("case", ["one cycle", "sequence", "lars"])
def test_the_preview_is_what_the_run_does(tmp_path: Path, case: str) -> None:
    config = make_config(tmp_path, epochs=5, **RESUMED[case])
    simulate(2, lambda comm: train(config, comm))
    rates = [record["lr"] for record in records(config) if record["kind"] == "train"]
    found = preview(config, 2)
    assert found.rates == rates
    assert {0, len(rates) - 1} <= set(found.notable)
    assert found.rates.index(max(rates)) in found.notable or case == "lars"
    found.write(str(tmp_path / "rates.tsv"))
    header, *lines = (tmp_path / "rates.tsv").read_text().splitlines()
    assert header == "step\tepoch\tlr"
    assert [float(line.split("\t")[2]) for line in lines] == rates


def test_the_plot_has_the_curve(tmp_path: Path) -> None:
    config = make_config(tmp_path, epochs=40, schedule={"name": "step", "step_size": 60, "gamma": 0.5})
    rows = preview(config, 1).plot().splitlines()
    curve = [row.partition("|")[2] for row in rows if "|" in row]
    assert curve[0] == "*" * 32, "the first half at the full rate"
    assert curve[len(curve) // 2] == " " * 32 + "*" * 32
    assert not any("*" in row for row in curve[len(curve) // 2 + 1 :])


def test_remarks_say_what_scales_the_rate(tmp_path: Path) -> None:
    scaling = {"name": "sgd", "lr": 0.1, "lr_scaling": "linear", "base_batch_size": 6}
    config = make_config(tmp_path, optimizer=scaling, accumulation=2, schedule=PLATEAU)
    out = io.StringIO()
    show(config, 3, None, Console(file=out, width=200))
    text = out.getvalue()
    assert "9 steps, 3 epochs of 3; batch of 24 = workers 3 x accumulation 2 x 4" in text
    assert "multiplied by 4: linear scaling with batch size 24 / 6" in text
    assert "as long as loss keeps improving" in text


def test_the_table_of_layers_says_what_the_optimizer_gets(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        optimizer={"name": "lars", "lr": 1.0, "weight_decay": 0.01, "lr_scaling": "linear", "base_batch_size": 12},
        layers={
            "decay": 0.5,
            "rules": [
                {"match": "0.bias", "freeze": True},
                {"match": "0.*", "freeze": True, "until_step": 4, "lr_factor": 2},
            ],
        },
        compressor={"name": "topk", "min_numel": 1},
    )
    table = layer_table(config)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("0.weight", "8x6", "0, from step 4 on", "2", "0.01", "topk", "yes"),
        ("0.bias", "8", "frozen", "", "", "", ""),
        ("3.weight", "2x8", "1", "2", "0.01", "topk", "yes"),
        ("3.bias", "2", "2", "2", "0", "dense", "no"),
    ]
    assert "66 of 74 elements are trained, in 3 groups" in str(table.caption)


@pytest.mark.parametrize("command", ["schedule", "layers"])
def test_the_commands_print(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, num_threads=None)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    monkeypatch.setattr(sys, "argv", ["disttrain", command, str(tmp_path / "config.yaml"), "optimizer.lr=0.25"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "learning rate" in out
    assert "0.25" in out
    assert json.dumps(config.to_dict())  # plain data, as a checkpoint keeps it
