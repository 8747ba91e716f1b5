"""Runs on simulated ranks."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from disttrain.comm import Communicator, SingleProcess, simulate
from disttrain.errors import UserError
from disttrain.training import config as configs
from disttrain.training.config import Config
from disttrain.training.trainer import Trainer
from tests.support.runs import make_config, records, stop_run, train, untimed_records

VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}},
    "cosine": {"schedule": {"name": "cosine", "warmup_steps": 2}},
    "accumulation": {"accumulation": 2},
    "clipping": {"clip_norm": 0.05},
    "frozen": {"task": {"frozen": True}},
    "small buckets": {"bucket_mb": 0.0001},
    "few samples": {"task": {"num_samples": 3, "num_held_out": 1}, "epochs": 5},
}


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_equal_one_process_on_the_joined_batch(tmp_path: Path, world_size: int, variant: str) -> None:
    alone = make_config(tmp_path / "alone", **VARIANTS[variant])
    # Without accumulation: so it is checked as well that it changes nothing.
    summary, reference = train(alone.model_copy(update={"accumulation": 1}), SingleProcess())
    together = make_config(tmp_path / "together", **VARIANTS[variant])
    for other_summary, model in simulate(world_size, lambda comm: train(together, comm)):
        assert other_summary["steps"] == summary["steps"]
        assert other_summary["metrics"]["error"] == pytest.approx(summary["metrics"]["error"], abs=1e-10)
        for name, value in reference.items():
            torch.testing.assert_close(model[name], value, rtol=0, atol=1e-10)
    for ours, theirs in zip(records(alone), records(together), strict=True):
        for key in ("step", "epoch", "loss", "lr", "error", "grad_norm"):
            assert ours.get(key) == pytest.approx(theirs.get(key), abs=1e-10), key


def test_the_same_seed_gives_the_same_run_and_another_one_another(tmp_path: Path) -> None:
    runs = [
        train(make_config(tmp_path / str(index), seed=seed, task={"dropout": 0.5}), SingleProcess())[1]
        for index, seed in enumerate([0, 0, 1])
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stop_at", [2, 4, 5, 7])  # three steps an epoch: within, and at an end
@pytest.mark.parametrize(
    "compressor",
    [
        "dense",
        {"name": "topk", "ratio": 0.1, "min_numel": 1},
        {"name": "powersgd", "rank": 1, "min_numel": 1},
        {
            "name": "topk",
            "min_numel": 1,
            "dense_steps": 4,
            "rules": [{"match": "0.*", "use": {"name": "powersgd", "rank": 1, "min_numel": 1}}],
        },
    ],
    ids=["dense", "topk", "powersgd", "rules and warmup"],
)
def test_resuming_equals_no_stop_bit_for_bit(tmp_path: Path, world_size: int, stop_at: int, compressor: Any) -> None:
    changes = {
        "compressor": compressor,
        "schedule": {"name": "cosine", "warmup_steps": 2},
        "checkpoint": {"every_steps": 1, "keep": 1},
        # Virtual ranks share the random generator, so their dropout depends on who is first.
        "task": {"batch_norm": True, "num_samples": 52, "dropout": 0.5 if world_size == 1 else 0.0},
    }

    reference = make_config(tmp_path / "reference", **changes)
    expected = simulate(world_size, lambda comm: train(reference, comm))
    config = make_config(tmp_path / "stopped", **changes, resume="auto")
    stop_run(config, world_size, stop_at)
    torch.manual_seed(99)  # what a new process would not have either
    resumed = simulate(world_size, lambda comm: train(config, comm))
    for (summary, model), (expected_summary, expected_model) in zip(resumed, expected, strict=True):
        for name, value in expected_model.items():
            assert torch.equal(model[name], value), name
        for key in ("steps", "epochs", "metrics", "wire"):
            assert summary[key] == expected_summary[key]
    assert untimed_records(config) == untimed_records(reference)
    assert not (tmp_path / "stopped/test.1").exists(), "resumed in place"


@pytest.mark.parametrize("compressor", ["dense", "topk", "dgc"])
@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_resuming_equals_no_stop_while_the_loss_scale_moves(tmp_path: Path, stop_at: int, compressor: str) -> None:
    changes = {
        "dtype": "float32",
        "precision": "fp16",
        "loss_scale": {"initial": 2.0**26, "growth_interval": 2},
        "compressor": {"name": compressor, "min_numel": 1},
        "checkpoint": {"every_steps": 1, "keep": 1},
        "accumulation": 2,
        "clip_norm": 0.5,
        "epochs": 7,
    }

    reference = make_config(tmp_path / "reference", **changes)
    expected = simulate(2, lambda comm: train(reference, comm))
    config = make_config(tmp_path / "stopped", **changes, resume="auto")
    stop_run(config, 2, stop_at)
    resumed = simulate(2, lambda comm: train(config, comm))
    for (summary, model), (expected_summary, expected_model) in zip(resumed, expected, strict=True):
        assert all(torch.equal(model[name], value) for name, value in expected_model.items())
        assert summary["skipped_steps"] == expected_summary["skipped_steps"] > 0
    scales = [record["loss_scale"] for record in records(config) if record["kind"] == "train"]
    assert scales == [record["loss_scale"] for record in records(reference) if record["kind"] == "train"]
    changes_of_scale = [after / before for before, after in pairwise(scales)]
    assert {0.5, 1.0, 2.0} == set(changes_of_scale)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_about_as_far_as_float32(tmp_path: Path, precision: str) -> None:
    changes: dict[str, Any] = {"dtype": "float32", "epochs": 10}
    full, _ = train(make_config(tmp_path / "full", **changes), SingleProcess())
    half, model = train(make_config(tmp_path / "half", precision=precision, **changes), SingleProcess())
    assert half["metrics"]["error"] == pytest.approx(full["metrics"]["error"], rel=0.05)
    assert half["metrics"]["error"] != full["metrics"]["error"]
    assert all(value.dtype == torch.float32 for value in model.values())


def residual_means(trainers: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([rank[name] for rank in trainers]).mean(0) for name in trainers[0]}


def pending(ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of the ranks' residuals, plus the servers' residuals, of which each rank has a slice."""
    means = residual_means([{k: v for k, v in rank.items() if not k.endswith("server_residual")} for rank in ranks])
    for name in [name for name in ranks[0] if name.endswith("server_residual")]:
        means[name.replace("server_", "")] += torch.cat([rank[name] for rank in ranks])
    return means


@pytest.mark.parametrize(("old", "new"), [(2, 3), (3, 1), (1, 4), (4, 2)])
@pytest.mark.parametrize("exchange", ["all_gather", "two_stage"])
@pytest.mark.parametrize("residuals", ["keep", "flush"])
def test_another_number_of_ranks_keeps_what_is_pending(
    tmp_path: Path, old: int, new: int, exchange: str, residuals: str
) -> None:
    changes: dict[str, Any] = {
        "compressor": {"name": "topk", "ratio": 0.05, "min_numel": 1, "exchange": exchange},
        "max_steps": 4,
        "checkpoint": {"residuals": residuals},
    }

    def residuals(comm: Communicator, config: Config) -> tuple[int, dict[str, torch.Tensor]]:
        trainer = Trainer(config, comm, Console(file=io.StringIO()))
        try:
            if config.resume == "never":
                trainer.run()
            return trainer.progress.step, trainer.optimizer.state_dict()["compression"]["per_rank"]
        finally:
            trainer.close()

    config = make_config(tmp_path, **changes)
    before = simulate(old, lambda comm: residuals(comm, config))
    after = simulate(new, lambda comm: residuals(comm, config.model_copy(update={"resume": "auto"})))
    assert {step for step, _ in after} == {4}
    expected = pending([state for _, state in before])
    assert any(value.abs().sum() > 0 for value in expected.values())
    for name, value in pending([state for _, state in after]).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-14, atol=1e-15)


def test_a_non_finite_gradient_is_counted_and_the_schedule_continues(tmp_path: Path) -> None:
    config = make_config(tmp_path, task={"bad_step": 1}, schedule={"name": "cosine"}, max_steps=4)
    summary, model = train(config, SingleProcess())
    assert summary["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in model.values())
    rates = [record["lr"] for record in records(config) if record["kind"] == "train"]
    assert len(set(rates)) == 4
    assert rates[0] == 0.1


def test_buffers_are_the_ranks_mean_when_evaluated_and_saved(tmp_path: Path) -> None:
    config = make_config(tmp_path, task={"batch_norm": True, "num_samples": 52})
    first, second = (model for _, model in simulate(2, lambda comm: train(config, comm)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["1.running_mean"].abs().sum() > 0


def test_evaluation_and_checkpoints_come_when_they_are_due(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        evaluation={"every_epochs": 2, "every_steps": 5},
        checkpoint={"every_epochs": None, "every_steps": 4, "keep": 9},
    )
    train(config, SingleProcess())
    assert [record["step"] for record in records(config) if record["kind"] == "evaluation"] == [5, 6, 9]
    saved = sorted(path.name for path in (config.directory / "checkpoints").iterdir())
    assert saved == ["step-00000004", "step-00000008", "step-00000009"]


def test_a_run_directory_holds_what_is_promised(tmp_path: Path) -> None:
    config = make_config(tmp_path, checkpoint={"keep": 1}, clip_norm=1.0)
    summary, _ = train(config, SingleProcess())
    assert json.loads((config.directory / "summary.json").read_text()) == summary
    promised = {"engine", "world_size", "steps", "epochs", "seconds", "samples_per_second", "metrics", "wire"}
    assert promised <= summary.keys()
    nothing = {"sent_bytes": 0, "received_bytes": 0, "dense_bytes": 0}
    assert summary["wire"] == {**nothing, "by_compressor": {"dense": nothing, "agreement": nothing}}
    assert configs.load(config.directory / "config.yaml") == config
    assert list((config.directory / "tensorboard").glob("events.*"))
    files = {path.name for path in (config.directory / "checkpoints/step-00000009").iterdir()}
    parts = {f"{name}.safetensors" for name in ("model", "optimizer", "compression", "rank-00000")}
    assert files == parts | {"manifest.json"}


def test_the_wire_is_counted(tmp_path: Path) -> None:
    config = make_config(tmp_path, dtype="float32", max_steps=2, compressor={"name": "topk", "min_numel": 1})
    (summary, _), (other, _) = simulate(2, lambda comm: train(config, comm))
    assert summary["wire"] == other["wire"]
    assert summary["wire"]["dense_bytes"] == 2 * 4 * (6 * 8 + 8 + 8 * 2 + 2)
    assert summary["wire"]["sent_bytes"] > 0
    parts = summary["wire"]["by_compressor"]
    assert parts.keys() == {"topk", "dense", "agreement"}
    for key in ("sent_bytes", "received_bytes", "dense_bytes"):
        assert summary["wire"][key] == sum(part[key] for part in parts.values())


def test_an_earlier_run_of_the_same_name_is_kept_beside(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        train(make_config(tmp_path, seed=seed, max_steps=1), SingleProcess())
    seeds = {name: configs.load(tmp_path / name / "config.yaml").seed for name in ("test", "test.1", "test.2")}
    assert seeds == {"test": 2, "test.1": 0, "test.2": 1}


def test_a_run_that_is_going_on_is_not_disturbed(tmp_path: Path) -> None:
    config = make_config(tmp_path, max_steps=1)
    trainer = Trainer(config, SingleProcess(), Console(file=io.StringIO()))
    with pytest.raises(UserError, match=r"a running process uses .*: choose another name"):
        Trainer(config, SingleProcess(), Console(file=io.StringIO()))
    trainer.run()
    trainer.close()
    train(config, SingleProcess())


def test_resuming_from_an_earlier_checkpoint_sets_later_ones_aside(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpoint": {"every_steps": 1, "keep": 9}, "max_steps": 4}
    config = make_config(tmp_path, **changes)
    _, expected = train(config, SingleProcess())
    saved = config.directory / "checkpoints"
    _, model = train(config.model_copy(update={"resume": str(saved / "step-00000002")}), SingleProcess())
    assert all(torch.equal(model[name], expected[name]) for name in expected)
    assert {path.name for path in saved.glob("*superseded*")} == {f"step-0000000{n}.superseded.1" for n in (3, 4)}
    assert [record["step"] for record in records(config) if record["kind"] == "train"] == [1, 2, 3, 4]


def test_another_run_can_be_resumed_under_a_new_name(tmp_path: Path) -> None:
    config = make_config(tmp_path, max_steps=3)
    train(config, SingleProcess())
    longer = config.model_copy(update={"name": "longer", "resume": str(config.directory), "max_steps": 5})
    summary, _ = train(longer, SingleProcess())
    assert summary["steps"] == 5
    assert [record["step"] for record in records(longer) if record["kind"] == "train"] == [4, 5]


@pytest.mark.parametrize(
    ("first", "changes", "message"),
    [
        (
            {},
            {"optimizer": {"name": "adamw", "lr": 0.1}},
            r"optimizer.name='adamw', but checkpoint .* was saved with 'sgd'",
        ),
        ({}, {"seed": 1}, r"in the middle of an epoch with seed=0 and 50 samples"),
        ({}, {"task": {"num_samples": 40}}, r"50 samples, and now there are seed=0 and 40 samples"),
        ({}, {"task": {"batch_norm": True}}, r"was saved with another model: .*running_mean"),
        ({}, {"compressor": {"name": "topk", "min_numel": 1}}, r"compressor"),
        ({}, {"resume": "elsewhere"}, r"resume='elsewhere': there is no complete checkpoint"),
    ],
)
def test_what_does_not_fit_a_checkpoint_is_refused(
    tmp_path: Path, first: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    train(make_config(tmp_path, max_steps=2, **first), SingleProcess())
    config = make_config(tmp_path, **{"max_steps": 2, "resume": "auto", **changes})
    with pytest.raises(UserError, match=message):
        simulate(2, lambda comm: train(config, comm))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 25}, "batch_size=25 does not divide evenly among 2 workers: use batch_size=24 or 26"),
        ({"batch_size": 1}, "use batch_size=2"),
        ({"precision": "fp16"}, "precision='fp16' is for models in float32, and dtype=float64: set dtype=float32"),
        ({"loss_scale": {"initial": 3}}, "loss_scale.initial=3.0 must be a power of two"),
        ({"schedule": {"name": "constant", "warmup_steps": 9}}, "must be less than the run's 9 steps"),
        ({"task": {"num_samples": 0}}, "TensorData is empty"),
        ({"drop_last": True, "task": {"num_samples": 20}}, "drop_last=true leaves no step: batch_size=24 is more than"),
    ],
)
def test_what_does_not_fit_the_workers_or_the_data_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        simulate(2, lambda comm: train(make_config(tmp_path, **changes), comm))


def test_loading_in_processes_of_their_own_changes_nothing(tmp_path: Path) -> None:
    _, expected = train(make_config(tmp_path / "alone", max_steps=4), SingleProcess())
    _, model = train(make_config(tmp_path / "loaders", max_steps=4, loader_workers=2), SingleProcess())
    assert all(torch.equal(model[name], expected[name]) for name in expected)
