"""Whole runs whose batch grows: each sample once per epoch, equal to one process, and resumed bit for bit."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.comm import Communicator, SingleProcess, simulate
from disttrain.errors import UserError
from disttrain.training import trainer as trainer_module
from disttrain.training.run.length import RunLength
from disttrain.training.trainer import Trainer
from tests.support.runs import make_config, records, stop_run, train, untimed_records

pytestmark = pytest.mark.usefixtures("one_thread")

NOISE = {"max_batch_size": 40, "min_measurements": 2, "smoothing": 0.5}
POLICIES: dict[str, dict[str, Any]] = {
    "schedule": {"name": "schedule", "milestones": [0.5, 1, 2.2], "max_batch_size": 23, "lr_scaling": "sqrt"},
    "plateau": {"name": "plateau", "factor": 0.3, "max_batch_size": 40, "max_micro_batch": 3, "lr_scaling": "linear"},
    "noise_scale": {"name": "noise_scale", **NOISE, "lr_scaling": "adascale", "growth": 1.5},
    "norm_test": {"name": "norm_test", **NOISE, "theta": 0.5, "max_micro_batch": "auto", "memory_gib": 7e-7},
}
every_policy = pytest.mark.parametrize("policy", POLICIES)


def config_of(output: Path, policy: str, **changes: Any) -> Any:
    values = {
        "batch_size": 4,
        "accumulation": 2,
        "epochs": 4,
        "batch": POLICIES[policy],
        "schedule": {"name": "cosine", "warmup_steps": 3},
        "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
    }
    return make_config(output, **{**values, **changes})


def sizes_in(config: Any) -> list[int]:
    return [record["batch_size"] for record in records(config) if record["kind"] == "train"]


@every_policy
@pytest.mark.parametrize("loader_workers", [0, 1])
def test_every_sample_is_used_once_per_epoch(
    tmp_path: Path, policy: str, loader_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if loader workers have read ahead in batches of the old size."""
    seen: list[tuple[int, float]] = []  # epoch and sample, over all ranks
    own = threading.local()
    to_device = trainer_module.to_device

    def noted(batch: Any, *args: Any) -> Any:
        seen.extend((own.trainer.sampler.epoch, number) for number in batch[0][:, 0].tolist())
        return to_device(batch, *args)

    def watched(comm: Communicator) -> None:
        own.trainer = Trainer(config, comm)
        try:
            own.trainer.run()
        finally:
            own.trainer.close()

    monkeypatch.setattr(trainer_module, "to_device", noted)
    config = config_of(tmp_path, policy, loader_workers=loader_workers, epochs=3)
    if loader_workers:  # processes are forked, so there should be no threads
        watched(SingleProcess())
    else:
        simulate(2, watched)
    counts = Counter(seen)
    assert Counter(epoch for epoch, _ in counts) == {0: 50, 1: 50, 2: 50}
    assert set(counts.values()) == {1}
    assert len(set(sizes_in(config))) > 1, "the batch has grown"


@pytest.mark.parametrize("policy", ["schedule", "plateau"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_process_on_the_same_growing_batch(tmp_path: Path, policy: str, world_size: int) -> None:
    alone = config_of(tmp_path / "alone", policy, batch_size=6, accumulation=1)
    together = config_of(tmp_path / "together", policy, batch_size=6, accumulation=1)
    _, reference = train(alone, SingleProcess())
    for _, model in simulate(world_size, lambda comm: train(together, comm)):
        for name, value in reference.items():
            torch.testing.assert_close(model[name], value, rtol=0, atol=1e-10)
    assert sizes_in(alone) == sizes_in(together)
    assert len(set(sizes_in(alone))) > 2
    for ours, theirs in zip(records(alone), records(together), strict=True):
        for key in ("step", "epoch", "loss", "lr", "gain"):
            assert ours.get(key) == pytest.approx(theirs.get(key), abs=1e-10), key


@every_policy
@pytest.mark.parametrize(
    ("world_size", "compressor"), [(1, "dense"), (2, {"name": "topk", "ratio": 0.1, "min_numel": 1})], ids=["1", "2"]
)
def test_resuming_equals_an_uninterrupted_run_while_the_batch_grows(
    tmp_path: Path, policy: str, world_size: int, compressor: Any
) -> None:
    changes = {
        "dtype": "float32",
        "precision": "fp16",
        "loss_scale": {"initial": 2.0**24, "growth_interval": 3},
        "compressor": compressor,
        "checkpoint": {"every_epochs": None},
        "epochs": 3,
    }
    reference = config_of(tmp_path / "reference", policy, **changes)
    expected = simulate(world_size, lambda comm: train(reference, comm))
    sizes = sizes_in(reference)
    grown = next(index for index, size in enumerate(sizes) if size > sizes[0])  # the first step of a larger batch
    stops = {grown + 1, len(sizes) - 1}
    for stop_at in sorted(stops):
        saved = {"every_steps": stop_at, "every_epochs": None}
        config = config_of(tmp_path / str(stop_at), policy, **{**changes, "checkpoint": saved}, resume="auto")
        stop_run(config, world_size, stop_at)
        resumed = simulate(world_size, lambda comm, config=config: train(config, comm))
        for (summary, model), (expected_summary, expected_model) in zip(resumed, expected, strict=True):
            assert all(torch.equal(model[name], value) for name, value in expected_model.items())
            assert summary["steps"] == expected_summary["steps"]
        assert untimed_records(config) == untimed_records(reference)
    assert len(set(sizes)) > 1


@every_policy
def test_another_number_of_ranks_resumes_with_the_same_samples(tmp_path: Path, policy: str) -> None:
    config = config_of(tmp_path, policy, checkpoint={"every_steps": 1, "keep": 1}, epochs=3, batch_size=12)

    def position(comm: Communicator, config: Any) -> tuple[int, int, int, int]:
        trainer = Trainer(config, comm)
        try:
            return (
                trainer.progress.epoch,
                trainer.progress.offset,
                trainer.batch.batch_size,
                trainer.sampler.batch_size,
            )
        finally:
            trainer.close()

    stop_run(config, 2, 4)
    resumed = config.model_copy(update={"resume": "auto"})
    [before] = set(simulate(2, lambda comm: position(comm, resumed)))
    [after] = set(simulate(3, lambda comm: position(comm, resumed)))
    assert before == after
    summary, _ = simulate(3, lambda comm: train(resumed, comm))[0]
    assert summary["epochs"] == 3


def test_skipped_steps_do_not_change_the_state_of_the_batch(tmp_path: Path) -> None:
    config = config_of(tmp_path, "noise_scale", task={"bad_step": 5}, max_steps=6)
    trainer = Trainer(config, SingleProcess())
    states = []
    step = trainer.train_step

    def watched(*args: Any) -> torch.Tensor:
        states.append(trainer.batch.state_dict())
        return step(*args)

    trainer.train_step = watched  # type: ignore[method-assign]
    try:
        assert trainer.run()["skipped_steps"] == 1
    finally:
        trainer.close()
    assert states[2] == states[3], "two backward passes a step: the third step was skipped"
    assert states[1] != states[2]
    assert states[3] != states[4]


def test_the_learning_rate_falls_where_the_batch_cannot_grow(tmp_path: Path) -> None:
    batch = {"name": "schedule", "milestones": [1, 2], "factor": 4, "max_batch_size": 32}
    config = config_of(tmp_path, "schedule", batch=batch, batch_size=8, schedule="constant", epochs=3)
    train(config, SingleProcess())
    rates = {(record["batch_size"], record["lr"]) for record in records(config) if record["kind"] == "train"}
    assert rates == {(8, 0.02), (32, 0.02), (32, 0.005)}


def test_adascale_runs_as_many_scale_invariant_steps_as_the_base_batch_has(tmp_path: Path) -> None:
    batch = {"name": "adascale", "base_batch_size": 4}
    config = config_of(tmp_path, "schedule", batch=batch, batch_size=16, epochs=4)
    summaries = simulate(2, lambda comm: train(config, comm))
    summary = summaries[0][0]
    base_steps = 4 * 13
    assert base_steps / 4 <= summary["steps"] < base_steps
    trained = [record for record in records(config) if record["kind"] == "train"]
    assert sum(record["gain"] for record in trained) == pytest.approx(base_steps, abs=4)
    assert all(1 <= record["gain"] <= 4 for record in trained)
    assert trained[-1]["lr"] < 0.3 * max(record["lr"] for record in trained), "the schedule reached its end"
    assert summary["ended_by"] == "last_step"


def test_schedules_follow_the_data_if_the_batch_grows(tmp_path: Path) -> None:
    config = config_of(tmp_path, "schedule", batch={**POLICIES["schedule"], "lr_scaling": "none", "max_batch_size": 50})
    train(config, SingleProcess())
    fixed = config_of(tmp_path / "fixed", "schedule", batch="fixed")
    train(fixed, SingleProcess())
    rate_at = {record["epoch"]: record["lr"] for record in records(fixed) if record["kind"] == "train"}
    starts = [0.0]
    for record in records(config):
        if record["kind"] == "train":
            if starts[-1] in rate_at:  # the rate of a step is that of its start
                following = min(epoch for epoch in rate_at if epoch > starts[-1])
                assert record["lr"] == pytest.approx(rate_at[following])
            starts.append(record["epoch"])
    assert len(starts) < len(rate_at)
    assert max(starts) == 4


def test_both_bounds_of_a_run_that_grows() -> None:
    from disttrain.batching import registry
    from disttrain.training.run.progress import Progress

    policy = registry.build({"name": "plateau", "max_batch_size": 100})
    run_length = RunLength(policy, batch_size=10, num_samples=100, epochs=4, max_steps=20)
    assert run_length.num_steps == 20
    assert run_length.position(Progress(step=10, epoch=1), 0) == 10
    assert run_length.position(Progress(step=10, epoch=3), 0) == 15
    assert not run_length.is_over(Progress(step=19, epoch=3, offset=99), 0)
    assert run_length.is_over(Progress(step=19, epoch=4), 0)
    assert run_length.is_over(Progress(step=20, epoch=3), 0)


def test_the_last_step_of_an_epoch_is_dropped_by_the_current_batch_size(tmp_path: Path) -> None:
    batch = {"name": "schedule", "milestones": [3], "unit": "step", "max_batch_size": 32, "factor": 2}
    config = config_of(tmp_path, "schedule", batch=batch, batch_size=16, drop_last=True, epochs=3)
    train(config, SingleProcess())
    assert sizes_in(config) == [16, 16, 16, 32, 32]
    assert [r["epoch"] for r in records(config) if r["kind"] == "train"] == [0.32, 0.64, 1, 2, 3]


def test_noise_needs_parts_to_compare(tmp_path: Path) -> None:
    config = config_of(tmp_path, "noise_scale", accumulation=1)
    with pytest.raises(UserError, match="start 2 or more workers, or set accumulation=2"):
        Trainer(config, SingleProcess())
    with pytest.raises(UserError, match=r"batch.max_batch_size=40 is below batch_size=64"):
        config_of(tmp_path, "noise_scale", batch_size=64)
    scaled = {"name": "sgd", "lr": 0.1, "base_batch_size": 4, "lr_scaling": "linear"}
    with pytest.raises(UserError, match="both scale the learning rate: remove the former"):
        config_of(tmp_path, "plateau", optimizer=scaled, batch={"name": "adascale", "base_batch_size": 4})
