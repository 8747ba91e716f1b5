"""Writing in the background: what training waits for, checkpoints in flight, and the end of a run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.comm import Communicator, SingleProcess, simulate
from disttrain.errors import UserError
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.training.checkpoints import contents as checkpoint
from disttrain.training.checkpoints import folder as checkpoint_folder
from disttrain.training.checkpoints import writer as checkpoint_writer
from disttrain.training.checkpoints.folder import Best, checkpoints_in
from disttrain.training.checkpoints.staging import StagingBuffers
from disttrain.training.checkpoints.writer import Writer
from tests.support import checkpoints
from tests.support.runs import make_config, records, train

Made = tuple[torch.nn.Module, DistributedOptimizer]


def make(comm: Communicator, value: float = 0.0) -> Made:
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, value)
    return model, DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing threads stop at it until it is set."""
    opened, entry_of = threading.Event(), checkpoint_writer.entry_of

    def slowly(path: Path) -> Any:
        assert opened.wait(30)
        return entry_of(path)

    monkeypatch.setattr(checkpoint_writer, "entry_of", slowly)
    return opened


def weight_in(path: Path) -> float:
    model, optimizer = make(SingleProcess())
    checkpoint.load(*checkpoint_folder.find(path), SingleProcess(), model, optimizer)
    assert len(set(model.weight.flatten().tolist())) == 1
    return model.weight[0, 0].item()


def test_what_is_written_is_of_the_moment_of_the_copy(tmp_path: Path, gate: threading.Event) -> None:
    comm, writer = SingleProcess(), Writer(SingleProcess(), 2)
    model, optimizer = make(comm, 1.0)
    first = checkpoints.take(writer, comm, tmp_path, model, optimizer, 1)
    torch.nn.init.constant_(model.weight, 2.0)
    second = checkpoints.take(writer, comm, tmp_path, model, optimizer, 2)
    torch.nn.init.constant_(model.weight, 3.0)
    assert writer.num_in_flight == 2
    assert checkpoints_in(tmp_path) == [], "training went on before anything was there"
    gate.set()
    writer.wait_for_oldest()
    writer.wait_for_oldest()
    writer.close()
    assert (weight_in(first), weight_in(second)) == (1.0, 2.0)


def test_a_checkpoint_is_there_as_soon_as_all_ranks_have_written_it(tmp_path: Path, gate: threading.Event) -> None:
    """No collective is needed: rank 1 does nothing after its copy."""
    gate.set()

    def run(comm: Communicator) -> None:
        writer = Writer(comm, 1)
        path = checkpoints.take(writer, comm, tmp_path, *make(comm), 7)
        if comm.rank == 0:
            for _ in range(3000):
                if path.exists():
                    break
                threading.Event().wait(0.01)
            assert checkpoint_folder.verified(path)
        writer.close()

    simulate(3, run)


def test_after_an_exception_what_was_on_its_way_is_finished(tmp_path: Path, gate: threading.Event) -> None:
    config = make_config(tmp_path, checkpoint={"every_steps": 3, "keep": 9})

    def stop(trainer: Any) -> None:
        if trainer.progress.step == 4:
            threading.Timer(0.2, gate.set).start()
            raise InterruptedError

    with pytest.raises(InterruptedError):
        simulate(2, lambda comm: train(config, comm, stop))
    assert [path.name for path in checkpoints_in(config.directory / "checkpoints")] == ["step-00000003"]


def test_ranks_that_are_gone_are_not_waited_for_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "_END_WITHIN", 0.1)

    def run(comm: Communicator) -> None:
        made = make(comm)
        if comm.rank == 0:
            writer = Writer(comm, 1)
            checkpoints.take(writer, comm, tmp_path, *made, 1)
            writer.close()

    simulate(2, run)
    assert checkpoints_in(tmp_path) == []


def test_the_next_save_waits_and_says_so(tmp_path: Path, gate: threading.Event) -> None:
    config = make_config(tmp_path, checkpoint={"every_steps": 2, "every_epochs": None}, max_steps=6)

    def open_late(trainer: Any) -> None:
        if trainer.progress.step == 3:
            assert checkpoints_in(config.directory / "checkpoints") == []
            threading.Timer(0.3, gate.set).start()

    train(config, SingleProcess(), open_late)
    waits = {r["step"]: r.get("checkpoint_wait_seconds", 0.0) for r in records(config) if r["kind"] == "train"}
    assert waits[5] > 0.1, "the save after step 4 waited for that after step 2; the record after it says so"
    assert waits[3] < 0.1


def test_in_the_foreground_it_is_there_at_once(tmp_path: Path) -> None:
    config = make_config(tmp_path, checkpoint={"every_steps": 2, "background": False}, max_steps=4)

    def check(trainer: Any) -> None:
        if trainer.progress.step == 2:
            assert checkpoint_folder.verified(config.directory / "checkpoints/step-00000002")

    train(config, SingleProcess(), check)


@pytest.mark.parametrize("failing_rank", [0, 1, 2])
def test_a_rank_that_cannot_write_is_heard_of_by_all_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_rank: int
) -> None:
    entry_of = checkpoint_writer.entry_of

    def failing(path: Path) -> Any:
        if path.name == f"rank-{failing_rank:05d}.safetensors" and "step-00000002" in str(path):
            raise OSError(28, "No space left on device")
        return entry_of(path)

    monkeypatch.setattr(checkpoint_writer, "entry_of", failing)
    changes = {"every_steps": 1, "every_epochs": None, "keep": 9}
    config = make_config(tmp_path, checkpoint=changes, max_steps=5)
    message = rf"No space left on device.*on rank {failing_rank}"
    with pytest.raises(UserError, match=message):
        simulate(3, lambda comm: train(config, comm))
    assert [path.name for path in (config.directory / "checkpoints").iterdir()] == ["step-00000001"]
    on = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"on_error": "continue"})})
    for summary, _ in simulate(3, lambda comm: train(on, comm)):
        assert summary["steps"] == 5
    steps = [int(path.name[5:]) for path in checkpoints_in(config.directory / "checkpoints")]
    assert steps == [1, 3, 4, 5]


def test_the_last_checkpoint_must_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "entry_of", failing)
    config = make_config(tmp_path, checkpoint={"on_error": "continue"}, max_steps=2)
    with pytest.raises(UserError, match="No space left on device"):
        train(config, SingleProcess())


def test_a_mistake_in_the_thread_is_raised_where_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoint_writer, "entry_of", broken)
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(SingleProcess(), tmp_path, *make(SingleProcess()), 1)


def test_the_best_stays(tmp_path: Path) -> None:
    best = Best(metric="error", mode="min")
    made = make(SingleProcess())
    for step, error in enumerate([3.0, 1.0, float("nan"), 2.0, 1.0], start=1):
        checkpoints.save(SingleProcess(), tmp_path, *made, step, keep=2, best=best, metrics={"error": error})
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000002", "step-00000004", "step-00000005"]


def test_keeping_the_best_needs_a_metric_that_there_is(tmp_path: Path) -> None:
    config = make_config(tmp_path, checkpoint={"keep_best": {"metric": "eror", "mode": "min"}})
    with pytest.raises(
        UserError, match=r"checkpoint.keep_best.metric='eror' is not a metric of the task; did you mean"
    ):
        train(config, SingleProcess())
    with pytest.raises(UserError, match=r"checkpoint\.keep_best needs evaluations"):
        make_config(
            tmp_path,
            checkpoint={"keep_best": {"metric": "error", "mode": "min"}},
            evaluation={"every_epochs": None, "every_steps": None},
        )


def test_memory_is_kept_from_one_copy_to_the_next() -> None:
    staging = StagingBuffers()
    tensors: Callable[[float], dict[str, Any]] = lambda value: {  # noqa: E731
        "a": {"x": torch.full((2, 3), value).T, "y": torch.tensor(value)}
    }
    first = staging.stage(tensors(1.0))
    places = {name: tensor.data_ptr() for name, tensor in first["a"].items()}
    assert first["a"]["x"].is_contiguous()
    second = staging.stage(tensors(2.0))
    assert {name: tensor.data_ptr() for name, tensor in second["a"].items()} == places
    assert second["a"]["x"].eq(2.0).all()
    other = staging.stage({"a": {"x": torch.zeros(4)}})
    assert other["a"].keys() == {"x"}
    assert other["a"]["x"].shape == (4,)
