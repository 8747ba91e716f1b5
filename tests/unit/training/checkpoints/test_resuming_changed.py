"""Resuming with another batch, other data, or a batch that has grown from another initial one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from disttrain.batching import GrowingBatch
from disttrain.comm import SingleProcess
from disttrain.errors import UserError
from disttrain.training.checkpoints import folder as checkpoint_folder
from tests.support.runs import make_config, records, train
from tests.support.tiny_task import Tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def train_records(output: Path, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config = make_config(output, **{"batch_size": 10, "epochs": 4, **changes})
    summary, _ = train(config, SingleProcess())
    return summary, [record for record in records(config) if record["kind"] == "train"]


@pytest.mark.parametrize(
    ("stop", "change", "steps"),
    [
        (10, {"batch_size": 10}, 20),
        (10, {"batch_size": 20}, 16),
        (10, {"batch_size": 5}, 30),
        (10, {"accumulation": 2}, 20),
        (10, {"task": {"num_samples": 30}}, 16),
        (10, {"task": {"num_samples": 100}}, 30),
        (12, {"batch_size": 20}, 17),  # 20 of an epoch's 50 samples: 20 and 10 are left
        (12, {"batch_size": 7}, 12 + 5 + 8),
        (4, {"batch_size": 20, "drop_last": True}, 4 + 3 * 2),  # the 10 that are left make no batch
        (10, {"batch_size": 20, "max_steps": 13}, 13),
        (10, {"batch_size": 20, "max_steps": 13, "epochs": None}, 13),
        (10, {"batch_size": 20, "max_steps": 100}, 16),
    ],
)
def test_the_epochs_that_were_asked_for_are_trained(
    tmp_path: Path, stop: int, change: dict[str, Any], steps: int
) -> None:
    train_records(tmp_path, max_steps=stop, drop_last=change.get("drop_last", False))
    summary, found = train_records(tmp_path, resume="auto", **change)
    assert summary["steps"] == steps == len(found)
    if "max_steps" not in change or change["max_steps"] > steps:
        assert summary["epochs"] == 4


@pytest.mark.parametrize("schedule", [{"name": "cosine", "warmup_epochs": 2.5}, {"name": "linear", "by": "epoch"}])
def test_schedules_continue_at_the_same_fraction_of_the_run(tmp_path: Path, schedule: dict[str, Any]) -> None:
    """As those of a run that has had the new batch from its beginning."""
    _, expected = train_records(tmp_path / "whole", schedule=schedule, batch_size=25)
    for stop, rest in ((10, 4), (5, 6)):  # two epochs are done, or one: within the warmup
        output = tmp_path / str(stop)
        train_records(output, schedule=schedule, max_steps=20, checkpoint={"every_epochs": 1, "keep": 9})
        at = output / f"test/checkpoints/step-{stop:08d}"
        _, found = train_records(output, schedule=schedule, batch_size=25, resume=str(at))
        assert [record["lr"] for record in found[stop:]] == [record["lr"] for record in expected[-rest:]]


def test_a_batch_that_has_grown_keeps_its_ratio(tmp_path: Path) -> None:
    batch = {"name": "schedule", "milestones": [1, 3], "max_batch_size": 50, "lr_scaling": "sqrt"}
    changes: dict[str, Any] = {"batch": batch, "schedule": {"name": "cosine", "warmup_epochs": 1}}
    _, expected = train_records(tmp_path / "whole", batch_size=10, **changes)
    train_records(tmp_path, batch_size=5, max_steps=15, **changes)  # 10 steps of 5, and 5 of 10: two epochs
    _, found = train_records(tmp_path, batch_size=10, resume="auto", **changes)
    tail = [record for record in expected if record["epoch"] > 2]
    assert [record["batch_size"] for record in tail] == [20, 20, 20, 40, 40]
    for key in ("batch_size", "gain", "lr"):
        assert [record[key] for record in found[15:]] == [record[key] for record in tail]


def test_growth_that_no_milestone_remembers_is_kept(tmp_path: Path) -> None:
    policy = {"name": "plateau", "max_batch_size": 40, "lr_scaling": "linear"}
    before = GrowingBatch(policy, SingleProcess(), 8, 100)
    before.resize(32)
    before.resume(10, 1.0)
    for initial, batch_size in ((8, 32), (4, 16), (16, 40)):
        after = GrowingBatch(policy, SingleProcess(), initial, 100)
        after.load_state_dict(before.state_dict())
        after.resume(10, 1.0)
        assert (after.batch_size, after.gain) == (batch_size, batch_size / initial)


def adascale(base: int) -> dict[str, Any]:
    return {"batch": {"name": "adascale", "base_batch_size": base}, "accumulation": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (adascale(10), "AdaScale measures a run in steps of that batch"),
        ({"accumulation": 2}, "AdaScale measures a run in steps of that batch"),
        ({"task": {"num_samples": 60}, **adascale(5)}, "use the same data, or limit the run by max_steps alone"),
    ],
)
def test_adascale_counts_in_steps_of_its_base_batch(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    train_records(tmp_path, max_steps=5, **adascale(5))
    with pytest.raises(UserError, match=message):
        train_records(tmp_path, resume="auto", **change)


def test_metrics_that_are_nan_are_never_the_best_and_do_not_keep_a_run_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = Tiny.evaluate

    def broken(task: Tiny, model: Any, batch: Any) -> dict[str, tuple[Any, int]]:
        return {name: (math.nan, count) for name, (_, count) in evaluate(task, model, batch).items()}

    changes: dict[str, Any] = {
        "early_stopping": {"metric": "error", "mode": "min", "patience": 9, "restore_best": True},
        "checkpoint": {"keep": 1, "keep_best": {"metric": "error", "mode": "min"}},
        "schedule": {"name": "reduce_on_plateau", "metric": "error"},
    }
    train_records(tmp_path, max_steps=5, **changes)
    monkeypatch.setattr(Tiny, "evaluate", broken)
    train_records(tmp_path, max_steps=10, resume="auto", **changes)
    summary, _ = train_records(tmp_path, resume="auto", **changes)
    assert (summary["steps"], summary["best"]["step"], summary["best"]["restored"]) == (20, 5, True)
    assert math.isfinite(summary["best"]["value"])
    found = [path.name for path in checkpoint_folder.checkpoints_in(tmp_path / "test/checkpoints")]
    assert found == ["step-00000005", "step-00000020"]


def test_a_folder_that_cannot_be_written_is_one_line_that_names_output(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"directory '.*file/test': Not a directory; set output to a writable folder"):
        train_records(tmp_path / "file")
