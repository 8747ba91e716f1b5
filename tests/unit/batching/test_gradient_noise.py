"""Gradient noise: unbiased for any number of ranks, independent of compression, loss scale and skipped steps."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer, LossScale
from disttrain.batching import GradientNoise
from disttrain.comm import Communicator, SingleProcess, simulate
from disttrain.reduction import SquaredNorms

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, TRACE, SQUARE = 40, 90.0, 3.0


def samples(count: int, seed: int) -> np.ndarray:
    """Gradients of single samples: a mean of squared norm 3, and noise of variance 90 that differs by entry."""
    draw = np.random.default_rng(seed)
    deviation = np.sqrt(np.arange(1, DIM + 1) * TRACE / (DIM * (DIM + 1) / 2))
    mean = np.full(DIM, math.sqrt(SQUARE / DIM))
    return np.asarray(mean + deviation * draw.standard_normal((count, DIM)))


def measured(gradients: np.ndarray, sizes: list[int]) -> SquaredNorms:
    """What a reducer measures if the ranks have ``sizes`` of the samples."""
    total, count = len(gradients), len(sizes)
    parts = np.split(gradients, np.cumsum(sizes)[:-1])
    # Each rank's loss is weighted by its share, so that the mean over ranks is that over samples.
    own = [part.sum(0) * count / total for part in parts]
    return SquaredNorms(float(np.mean([np.square(g).sum() for g in own])), float(np.square(np.mean(own, 0)).sum()))


@pytest.mark.parametrize("sizes", [[32, 32], [16] * 4, [8] * 8, [30, 2, 32], [9, 0, 9, 9, 9, 9, 9, 10]], ids=str)
def test_the_estimates_are_unbiased_from_any_number_of_ranks(sizes: list[int]) -> None:
    noise = GradientNoise(smoothing=0.9998)
    for step in range(2500):
        assert noise.update(measured(samples(sum(sizes), step), sizes), sizes, sum(sizes))
    assert noise.trace == pytest.approx(TRACE, rel=0.05)
    assert noise.square_norm == pytest.approx(SQUARE, rel=0.05)
    assert noise.scale == pytest.approx(TRACE / SQUARE, rel=0.05)


def test_one_process_compares_its_first_pass_with_the_whole() -> None:
    noise = GradientNoise(smoothing=0.9998)
    for step in range(2500):
        gradients = samples(64, step)
        norms = SquaredNorms(
            float(np.square(gradients[:16].sum(0) / 64).sum()), float(np.square(gradients.mean(0)).sum())
        )
        assert noise.update(norms, [16], 64)
    assert noise.scale == pytest.approx(TRACE / SQUARE, rel=0.05)
    assert not noise.update(norms, [64], 64), "there is only one part"


def test_the_two_estimates_are_smoothed_separately() -> None:
    noise, pairs = GradientNoise(smoothing=0.5), []
    for step in range(3):
        norms = measured(samples(8, step), [4, 4])
        trace = (norms.local - norms.averaged) * 8
        pairs.append((norms.averaged - trace / 8, trace))
        noise.update(norms, [4, 4], 8)
    weights = [0.125, 0.25, 0.5]
    square, trace = (sum(w * pair[i] for w, pair in zip(weights, pairs, strict=True)) / sum(weights) for i in (0, 1))
    assert (noise.square_norm, noise.trace) == pytest.approx((max(0, square), max(0, trace)))
    again = GradientNoise(smoothing=0.5)
    again.load_state_dict(noise.state_dict())
    assert again.state_dict() == noise.state_dict()


def test_the_gain_is_the_ratio_if_all_is_noise_and_one_without_noise() -> None:
    noise = GradientNoise()
    assert noise.gain(16, 256) == 1, "before anything was measured"
    noise.update(SquaredNorms(local=100 / 32, averaged=100 / 64), [32, 32], 64)  # no mean
    assert noise.square_norm == pytest.approx(0)
    assert noise.gain(16, 256) == pytest.approx(16)
    assert noise.scale > 1e6
    noise = GradientNoise()
    noise.update(SquaredNorms(local=5.0, averaged=5.0), [32, 32], 64)  # no noise
    assert noise.trace == 0
    assert noise.gain(16, 256) == 1
    noise = GradientNoise()
    noise.update(SquaredNorms(local=5.0 + 160 / 32, averaged=5.0 + 160 / 64), [32, 32], 64)
    assert noise.gain(16, 256) == pytest.approx((5 + 160 / 16) / (5 + 160 / 256))


with torch.random.fork_rng():
    torch.manual_seed(0)
    MODEL = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2)).double()


def loss_of(model: nn.Module, rank: int, step: int, part: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + part)
    return model(torch.randn(5, 6, generator=generator, dtype=torch.float64)).square().mean()


def square_of(losses: torch.Tensor, model: nn.Module) -> float:
    return sum(grad.square().sum().item() for grad in torch.autograd.grad(losses, list(model.parameters())))


@pytest.mark.parametrize(
    "spec",
    [{"name": "dense"}, {"name": "topk"}, {"name": "powersgd", "rank": 1}, {"name": "dgc"}, {"name": "fp16"}],
    ids=lambda spec: spec["name"],
)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_norms_are_those_of_raw_gradients(spec: dict[str, Any], scaled: bool, world_size: int) -> None:
    def run(comm: Communicator) -> None:
        model = copy.deepcopy(MODEL)
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            comm=comm,
            compressor={**spec, "min_numel": 0, "dense_steps": 2},
            clip_norm=1e-3,
            loss_scale=LossScale(2.0**10) if scaled else None,
            norms_every=2,
        )
        num_finite = 0
        for step, is_infinite in enumerate([False, False, True, False, True, True, False, False, False]):
            own = [square_of(loss_of(model, rank, step), model) for rank in range(world_size)]
            mean = sum(loss_of(model, rank, step) for rank in range(world_size)) / world_size
            assert isinstance(mean, torch.Tensor)
            whole = square_of(mean, model)
            optimizer.zero_grad()
            factor = math.inf if is_infinite and comm.rank == 1 else 1.0
            optimizer.scale(loss_of(model, comm.rank, step) * factor).backward()
            optimizer.step()
            if is_infinite or num_finite % 2:  # skipped steps do not count
                assert optimizer.norms is None
            else:
                assert optimizer.norms is not None
                assert optimizer.norms == pytest.approx((sum(own) / world_size, whole), rel=1e-9)
            num_finite += not is_infinite
        measured_bytes = optimizer.wire.by_compressor["statistics"].sent_bytes
        assert (measured_bytes > 1000) == (spec["name"] != "dense"), "compressed gradients take one more dense exchange"

    simulate(world_size, run)


def test_one_process_measures_its_first_pass() -> None:
    model = copy.deepcopy(MODEL)
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        comm=SingleProcess(),
        compressor={"name": "topk", "min_numel": 0},
        loss_scale=LossScale(),
        norms_every=1,
    )
    for step in range(3):
        first = square_of(loss_of(model, 0, step) / 2, model)
        whole = square_of((loss_of(model, 0, step) + loss_of(model, 0, step, 1)) / 2, model)
        optimizer.zero_grad()
        with optimizer.no_sync():
            optimizer.scale(loss_of(model, 0, step) / 2).backward()
            optimizer.measure_first_pass()
        optimizer.scale(loss_of(model, 0, step, 1) / 2).backward()
        optimizer.step()
        assert optimizer.norms == pytest.approx((first, whole), rel=1e-9)


def test_a_step_whose_gradients_come_in_two_exchanges_is_not_measured() -> None:
    def run(comm: Communicator) -> list[Any]:
        model = copy.deepcopy(MODEL)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(inner, model, comm=comm, compressor="topk", norms_every=1)
        found = []
        for num_passes in (1, 2, 1):
            optimizer.zero_grad()
            for part in range(num_passes):
                loss_of(model, comm.rank, part).backward()
            optimizer.step()
            found.append(optimizer.norms)
        return found

    for first, second, third in simulate(2, run):
        assert first is not None
        assert second is None
        assert third is not None


@pytest.mark.parametrize(("compressor", "expected"), [("dense", list(range(12))), ("topk", [0, 1, 2, 10])])
def test_measurements_that_cost_an_exchange_are_rare(compressor: str, expected: list[int]) -> None:
    def run(comm: Communicator) -> list[int]:
        model = copy.deepcopy(MODEL)
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            comm=comm,
            compressor={"name": compressor, "min_numel": 0, "dense_steps": 3},
            norms_every="auto",
        )
        measured = []
        for step in range(12):
            optimizer.zero_grad()
            loss_of(model, comm.rank, step).backward()
            optimizer.step()
            measured += [step] * (optimizer.norms is not None)
        return measured

    assert simulate(2, run) == [expected] * 2
