"""The limit of samples per backward pass that follows from measured memory, and runs that keep to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from disttrain.batching.micro_batch_limit import SHARE, MemoryLimit
from disttrain.comm import Communicator, SingleProcess, simulate
from disttrain.training.trainer import Trainer
from tests.support.runs import make_config, train

pytestmark = pytest.mark.usefixtures("one_thread")

BYTES = 6 * 8 + 8 * 8  # per sample: float64 inputs of both linear layers; tanh saves that of the second
GIB = 2.0**-30


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def run_pass(model: nn.Module, num_samples: int) -> None:
    generator = torch.Generator().manual_seed(num_samples)
    model(torch.randn(num_samples, 6, generator=generator, dtype=torch.float64)).sum().backward()


def measure(limit: MemoryLimit, model: nn.Module, *sizes: int) -> int:
    limit.num_steps = 1
    for size in sizes:
        with limit.measure(model, size):
            run_pass(model, size)
    limit.end_step()
    return limit.max_samples


@pytest.mark.parametrize("num_samples", [1, 7, 64])
def test_the_limit_does_not_depend_on_the_size_of_the_measured_pass(num_samples: int) -> None:
    limit = MemoryLimit(SingleProcess(), max_samples=1, limit_gib=20.5 * BYTES * GIB)
    assert measure(limit, make_model(), num_samples) == 20


def test_free_memory_counts_unless_a_limit_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = MemoryLimit(SingleProcess(), max_samples=1)
    monkeypatch.setattr(limit, "_free_memory", lambda: 20.5 * BYTES / SHARE)
    assert measure(limit, make_model(), 3) == 20
    monkeypatch.undo()
    assert measure(limit, make_model(), 3) > 1000


def test_measuring_leaves_gradients_as_they_are() -> None:
    model = make_model()
    run_pass(model, 5)
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    measure(MemoryLimit(SingleProcess(), max_samples=1), model, 5)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert gradient is not None
        assert torch.equal(parameter.grad, gradient)


def test_only_the_second_step_after_a_change_is_measured() -> None:
    limit = MemoryLimit(SingleProcess(), max_samples=1, limit_gib=20.5 * BYTES * GIB)
    model, seen = make_model(), []
    for _ in range(3):
        with limit.measure(model, 2):
            run_pass(model, 2)
        limit.end_step()
        seen.append(limit.max_samples)
    assert seen == [1, 20, 20]


def test_all_ranks_have_the_lowest_limit_of_any_pass() -> None:
    def run(comm: Communicator) -> int:
        gib = (20.5, 12.5, 30.5)[comm.rank] * BYTES * GIB
        limit = MemoryLimit(comm, max_samples=1, limit_gib=gib)
        return measure(limit, make_model(), *[3] * comm.rank)  # rank 0 has no pass

    assert simulate(3, run) == [12] * 3


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_growing_batch_takes_passes_as_large_as_fit(tmp_path: Path, world_size: int) -> None:
    """The first passes are as large as the config says; later ones are as large as fits."""
    config = make_config(
        tmp_path,
        batch_size=4,
        epochs=4,
        batch={
            "name": "schedule", "milestones": [1, 2, 3], "max_batch_size": 40, "max_micro_batch": "auto",
            "memory_gib": 8.5 * (BYTES + 4 * 8) * GIB,  # the loss saves outputs and targets
        },
    )  # fmt: skip

    def run(comm: Communicator) -> dict[int, int]:
        largest: dict[int, int] = {}

        def note(trainer: Trainer) -> None:
            share = next(trainer.sampler.shares())
            taken = max(stop - start for start, stop in share.micro_batches)
            largest[trainer.sampler.batch_size] = max(largest.get(trainer.sampler.batch_size, 0), taken)

        train(config, comm, note)
        return largest

    expected = {1: {4: 4, 8: 8, 16: 8, 32: 8}, 2: {4: 2, 8: 4, 16: 8, 32: 8}}[world_size]
    assert simulate(world_size, run)[0] == expected
