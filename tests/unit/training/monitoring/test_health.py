"""Health checks: all ranks must report each injected fault correctly."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer
from disttrain.comm import Communicator, simulate
from disttrain.comm.liveness.guard import Guard
from disttrain.compression import Bucket, Program, State, TopK
from disttrain.errors import UnhealthyError
from disttrain.optim.replicas.comparison import first_difference
from disttrain.training.monitoring.health import Health, Monitor
from disttrain.training.trainer import Trainer
from tests.support.runs import make_config, records, stop_run, train, untimed_records
from tests.support.tiny_task import Tiny

TOPK = {"name": "topk", "ratio": 0.1, "min_numel": 1}


def events(config: Any) -> list[dict[str, Any]]:
    return [record for record in records(config) if record["kind"] == "event"]


def flip_bit(tensor: torch.Tensor, index: int = 3) -> None:
    """One of one element's."""
    with torch.no_grad():
        tensor.view(-1).view(torch.int64)[index] ^= 1 << 40


# Replicas.


@pytest.mark.parametrize(
    ("what", "lr"), [("3.weight", 0.1), ("0.bias", 0.1), ("3.weight/momentum_buffer", 1e-30)], ids=str
)
def test_a_flipped_bit_is_found_and_named(tmp_path: Path, what: str, lr: float) -> None:
    config = make_config(tmp_path, health={"every": 2}, optimizer={"name": "sgd", "lr": lr, "momentum": 0.5})
    name, _, key = what.partition("/")

    def flip(trainer: Trainer) -> None:
        if trainer.progress.step == 3 and trainer.comm.rank == 1:
            parameter = trainer.model.get_parameter(name)
            flip_bit(trainer.optimizer.inner.state[parameter][key] if key else parameter, 1)

    messages = set()

    def run(comm: Communicator) -> None:
        with pytest.raises(UnhealthyError) as raised:
            train(config, comm, flip)
        messages.add(str(raised.value))

    simulate(3, run)
    assert messages == {
        f"step 4: {what} on rank 1 differs from the other ranks: "
        "resume from a checkpoint, on other hardware if it happens again"
    }
    assert [{**event, "kind": ""} for event in events(config)] == [
        {"kind": "", "step": 4, "event": "difference", "tensor": what, "ranks": [1]}
    ]


def test_a_difference_is_only_warned_about_if_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(tmp_path, health={"every": 1, "on_difference": "warn"})

    def flip(trainer: Trainer) -> None:
        if trainer.progress.step == 7 and trainer.comm.rank == 0:
            flip_bit(trainer.model[0].weight)  # type: ignore[index, arg-type]

    simulate(3, lambda comm: train(config, comm, flip))
    assert [(event["step"], event["ranks"]) for event in events(config)] == [(8, [0]), (9, [0])]
    assert "0.weight on rank 0 differs from the other ranks" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("victim", [0, 2])
def test_tensors_of_any_type_and_shape_are_compared(dtype: torch.dtype, victim: int) -> None:
    def run(comm: Communicator) -> list[Any]:
        shapes = [(), (0,), (3,), (4, 5), (2, 3, 4, 5)]
        tensors = {f"{index}": torch.ones(shape).to(dtype) for index, shape in enumerate(shapes)}
        tensors["4"] = tensors["4"].contiguous(memory_format=torch.channels_last)
        found = [first_difference(tensors, comm)]
        for name in ("4", "2", "0"):
            if comm.rank == victim:
                tensors[name][(-1,) * tensors[name].dim()] = 0
            found.append(first_difference(tensors, comm))
        return found

    results = simulate(3, run)
    assert results == [[None, ("4", [victim]), ("2", [victim]), ("0", [victim])]] * 3


def test_of_two_copies_the_first_ranks_is_taken_for_right() -> None:
    def run(comm: Communicator) -> Any:
        return first_difference({"a": torch.ones(3), "b": torch.full((3,), float(comm.rank))}, comm)

    assert simulate(2, run) == [("b", [1])] * 2
    assert simulate(4, run) == [("b", [1, 2, 3])] * 4


def test_replicas_are_identical_with_every_optimizer_and_compressor(tmp_path: Path) -> None:
    for number, (optimizer, compressor) in enumerate(
        [("adamw", {**TOPK}), ("lamb", {"name": "powersgd", "rank": 1, "min_numel": 1}), ("sgd", "dense")]
    ):
        changes: dict[str, Any] = {"optimizer": {"name": optimizer, "lr": 0.01}, "compressor": compressor}
        config = make_config(tmp_path / str(number), health={"every": 1}, **changes)
        simulate(3, lambda comm, config=config: train(config, comm))  # type: ignore[misc]
        assert events(config) == []


# Gradients that are not finite.


def poison(*samples: int) -> Any:
    """Before every step: these samples' inputs are NaN."""

    def before_step(trainer: Trainer) -> None:
        trainer.train_data.tensors[0][list(samples)] = math.nan  # type: ignore[attr-defined]

    return before_step


def test_the_samples_of_a_skipped_step_are_noted_for_the_rank_that_had_them(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    simulate(3, lambda comm: train(config, comm, poison(17)))
    found = events(config)
    assert len(found) == 3, "one in each epoch"
    for event in found:
        ((rank, samples),) = event["samples"].items()
        assert event["event"] == "skipped"
        assert 17 in samples
        assert len(samples) < 24
        assert rank in "012"
        assert event["in_a_row"] == 1
    assert len({tuple(*event["samples"].values()) for event in found}) == 3


def test_too_many_skipped_steps_in_a_row_end_the_run_with_one_line(tmp_path: Path) -> None:
    config = make_config(tmp_path, task={"num_samples": 24}, epochs=9, health={"max_skipped": 4})
    messages = set()

    def run(comm: Communicator) -> None:
        with pytest.raises(UnhealthyError) as raised:
            train(config, comm, poison(17))
        messages.add(str(raised.value))

    simulate(2, run)
    (message,) = messages
    assert message.startswith("step 4 is the last of 4 consecutive steps with a non-finite gradient, on rank ")
    assert "(metrics.jsonl lists all): check them, lower optimizer.lr, or set health.max_skipped" in message
    assert [event["in_a_row"] for event in events(config)] == [1, 2, 3, 4]
    for event in events(config):  # of steps that end an epoch
        assert [17 in samples for samples in event["samples"].values()] == [True]


class Overflowing(Tiny):
    """Its second loss is infinite, its gradients are not."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        is_second = model.num_calls == 1
        return super().loss(model, batch) + (math.inf if is_second else 0.0)


def test_a_loss_that_is_not_finite_is_named_though_gradients_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = {"name": f"{__name__}:Overflowing"}
    config = make_config(tmp_path, max_steps=3, task=task)
    simulate(2, lambda comm: train(config, comm))
    assert [(event["step"], event["event"], event["loss"]) for event in events(config)] == [(2, "loss", "inf")]
    assert "step 2: the loss is inf, but all gradients are finite" in caplog.text


def test_finite_steps_reset_the_count(tmp_path: Path) -> None:
    config = make_config(tmp_path, epochs=4, health={"max_skipped": 2})
    summaries = simulate(2, lambda comm: train(config, comm, poison(17))[0])
    assert [summary["skipped_steps"] for summary in summaries] == [4, 4]


def test_overflows_count_only_when_the_loss_scale_cannot_fall(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "dtype": "float32",
        "precision": "fp16",
        "task": {"num_samples": 24},
        "health": {"max_skipped": 2},
        "epochs": 20,
    }
    falling = make_config(tmp_path / "falling", loss_scale={"initial": 2.0**30}, **changes)
    summaries = simulate(2, lambda comm: train(falling, comm)[0])
    assert summaries[0]["skipped_steps"] > 4
    assert events(falling) == []

    stuck = make_config(tmp_path / "stuck", loss_scale={"initial": 8.0, "minimum": 1.0}, **changes)

    def run(comm: Communicator) -> None:
        with pytest.raises(UnhealthyError, match=r"step 5 is the last of 2 consecutive steps"):
            train(stuck, comm, poison(17))

    simulate(2, run)
    assert [event["step"] for event in events(stuck)] == [4, 5]


# Compression.


class Contrary(TopK):
    """Top-k that, from its 4th step on, sends one layer's gradient the wrong way round."""

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        mean, new = yield from super().reduce(grad, bucket, state)
        if state.step >= 3 and "1.weight" in bucket.names:
            bucket.split(mean)[bucket.names.index("1.weight")].neg_()
        return mean, new


class Notes:
    def __init__(self) -> None:
        self.numbers: list[tuple[int, Any]] = []
        self.events: list[tuple[int, Any]] = []

    def log_health(self, step: int, record: Any) -> None:
        self.numbers.append((step, record))

    def log_event(self, step: int, record: Any) -> None:
        self.events.append((step, record))


with torch.random.fork_rng():
    torch.manual_seed(0)
    MODEL = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)).double()


def monitored(
    comm: Communicator, compressor: Any, health: Health, num_steps: int, before: Any = lambda step, optimizer: None
) -> tuple[Notes, list[set[str]], DistributedOptimizer]:
    """Notes, and by step the compressors that carried something."""
    model = copy.deepcopy(MODEL)
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model, comm=comm, compressor=compressor, bucket_mb=0.001
    )
    monitor, notes, used = Monitor(health, optimizer), Notes(), []
    for step in range(1, num_steps + 1):
        before(step, optimizer)
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(100 * step + comm.rank)
        model(torch.randn(16, 8, generator=generator, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        monitor.after_step(step, None, notes)  # type: ignore[arg-type]
        used.append({f"{name}:{entry.account.compressor}" for entry in optimizer.wire.entries
                     if entry.account.bucket is not None for name in entry.account.bucket.names})  # fmt: skip
    return notes, used, optimizer


@pytest.mark.parametrize("hierarchical", [False, True])
def test_a_compressor_that_goes_astray_is_named_by_layer_and_replaced_for_a_while(
    hierarchical: bool, caplog: pytest.LogCaptureFixture
) -> None:
    compressor = Contrary(ratio=0.3, min_numel=1, hierarchical=hierarchical)
    health = Health(cosine_every=2, min_cosine=-0.1, dense_steps=5)
    results = simulate(4, lambda comm: monitored(comm, compressor, health, 12), local_size=2)
    for notes, used, optimizer in results:
        assert [(step, event["event"], event["layer"]) for step, event in notes.events] == [
            (4, "compression", "1.weight"),
            (10, "compression", "1.weight"),
        ]
        assert notes.events[0][1]["what"].startswith("its compressed mean has cosine -0.")
        dense = [step for step, names in enumerate(used, 1) if "1.weight:dense" in names]
        assert dense == [5, 6, 7, 8, 9, 11, 12]
        assert all("0.weight:topk" in names for names in used), "in another bucket"
        assert {step for step, _ in notes.numbers} == {2, 4, 6, 8, 10, 12}
        assert "cosine/1.weight" not in dict(notes.numbers)[6], "it is exchanged dense"
        for one, other in zip(optimizer.model.parameters(), results[0][2].model.parameters(), strict=True):
            assert torch.equal(one, other)
    assert "step 4: 1.weight: its compressed mean has cosine" in caplog.text
    assert "its bucket is exchanged dense for 5 steps" in caplog.text


def test_a_residual_that_grows_beyond_measure_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def blow_up(step: int, optimizer: DistributedOptimizer) -> None:
        if step == 4 and optimizer.comm.rank == 2:
            bucket = next(b for b in optimizer.reducer.buckets if "2.weight" in b.description.names)
            bucket.description.split(bucket.state.residual)[bucket.description.names.index("2.weight")].fill_(1e30)

    health = Health(every=2, dense_steps=0)
    for notes, used, _ in simulate(3, lambda comm: monitored(comm, TOPK, health, 4, blow_up)):
        ((step, event),) = notes.events
        assert (step, event["layer"]) == (4, "2.weight")
        assert event["what"].endswith("times its gradient, above health.max_residual=10000")
        assert all("2.weight:topk" in names for names in used), "only a warning was asked for"
        first = dict(notes.numbers)[2]
        assert set(first) == {"residual/0.weight", "residual/1.weight", "residual/2.weight"}
        assert all(0 < value < 10 for value in first.values())
    assert "exchanged dense" not in caplog.text


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stop_at", [3, 5, 8])
def test_a_run_resumed_amid_dense_steps_equals_one_without_a_stop(
    tmp_path: Path, world_size: int, stop_at: int
) -> None:
    changes: dict[str, Any] = {
        "compressor": TOPK,
        "checkpoint": {"every_steps": 1, "keep": 1},
        "health": {"every": 2, "max_residual": 0.5, "dense_steps": 3},
    }
    reference = make_config(tmp_path / "reference", **changes)
    expected = simulate(world_size, lambda comm: train(reference, comm))
    found = events(reference)
    assert found[0]["step"] == 2
    assert len({event["step"] for event in found}) > 1
    config = make_config(tmp_path / "stopped", **changes, resume="auto")
    stop_run(config, world_size, stop_at)
    for (_, model), (_, wanted) in zip(simulate(world_size, lambda comm: train(config, comm)), expected, strict=True):
        assert all(torch.equal(model[name], value) for name, value in wanted.items())
    assert untimed_records(config) == untimed_records(reference)


def test_the_slowest_rank_is_in_the_metrics(tmp_path: Path) -> None:
    config = make_config(tmp_path)

    def run(comm: Communicator) -> None:
        comm.guard = SimpleNamespace(metrics=Guard.metrics.fget(SimpleNamespace(straggler=(1, 2.5))))  # type: ignore
        train(config, comm)

    simulate(2, run)
    trained = [record for record in records(config) if record["kind"] == "train"]
    assert {(record["straggler/rank"], record["straggler/ratio"]) for record in trained} == {(1, 2.5)}


def test_watching_changes_no_number(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"compressor": TOPK, "optimizer": {"name": "adamw", "lr": 0.01}}
    off = {"every": None, "max_skipped": None, "cosine_every": None}
    on = {"every": 1, "cosine_every": 1, "min_cosine": None, "max_residual": None}
    models = []
    for health in (off, on):
        config = make_config(tmp_path / str(len(models)), health=health, **changes)
        models.append(simulate(2, lambda comm, config=config: train(config, comm)[1])[0])  # type: ignore[misc]
        assert any(record["kind"] == "health" for record in records(config)) == (health is on)
    assert all(torch.equal(models[0][name], value) for name, value in models[1].items())
