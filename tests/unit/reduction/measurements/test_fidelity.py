"""The measured error of compression by layer, and dense steps that send the residuals."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer
from disttrain.comm import Communicator, SingleProcess, simulate
from disttrain.compression import Bucket, Program, State, TopK
from disttrain.reduction.measurements.fidelity import Fidelity, FidelityMeter
from tests.unit.reduction.test_reducer import COMPRESSORS, TELESCOPING

with torch.random.fork_rng():
    torch.manual_seed(0)
    MODEL = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)).double()


def build(comm: Communicator, compressor: Any, **options: Any) -> DistributedOptimizer:
    model = copy.deepcopy(MODEL)
    return DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm, compressor=compressor, **options
    )


def gradients(rank: int, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in MODEL.parameters()]


def step(optimizer: DistributedOptimizer, number: int) -> list[torch.Tensor]:
    """A step on gradients that depend on rank and number alone; the means."""
    optimizer.zero_grad()
    parameters = list(optimizer.model.parameters())
    given = gradients(optimizer.comm.rank, number)
    sum((p * g).sum() for p, g in zip(parameters, given, strict=True)).backward()  # type: ignore[union-attr]
    optimizer.step()
    return [p.grad.clone() for p in parameters]  # type: ignore[union-attr]


def mean_gradients(world_size: int, number: int) -> list[torch.Tensor]:
    ranks = [gradients(rank, number) for rank in range(world_size)]
    return [torch.stack(parts).mean(0) for parts in zip(*ranks, strict=True)]


def measure(comm: Communicator, compressor: Any, num_steps: int = 3, **options: Any) -> tuple[Any, ...]:
    optimizer = build(comm, compressor, **options)
    meter = FidelityMeter(1, 1, optimizer.reducer.executor)
    optimizer.reducer.meters.append(meter)
    means = [step(optimizer, number) for number in range(num_steps)]
    return optimizer.reducer.results[meter], means, optimizer


@pytest.mark.parametrize("local_size", [3, 1])
def test_numbers_match_their_definition(local_size: int) -> None:
    spec = {"name": "topk", "ratio": 0.1, "min_numel": 1, "hierarchical": local_size == 1}
    results = simulate(3, lambda comm: measure(comm, spec), local_size=local_size)
    dense = dict(zip([name for name, _ in MODEL.named_parameters()], mean_gradients(3, 2), strict=True))
    for fidelity, means, optimizer in results:
        assert isinstance(fidelity, Fidelity)
        assert fidelity == results[0][0], "bit-identical on all ranks"
        assert set(fidelity.cosine) == set(fidelity.residual) == {"0.weight", "1.weight", "2.weight"}
        ours = dict(zip(dense, means[-1], strict=True))
        for name, cosine in fidelity.cosine.items():
            wanted = torch.cosine_similarity(ours[name].view(-1), dense[name].view(-1), dim=0)
            assert cosine == pytest.approx(float(wanted), abs=1e-12)
        del optimizer
    for index, name in ((0, "0.weight"), (2, "1.weight"), (4, "2.weight")):
        residual = sum(
            float(optimizer.state_dict()["compression"]["per_rank"][f"{name}/residual"].square().sum())
            for _, _, optimizer in results
        )
        own = sum(float(gradients(rank, 2)[index].square().sum()) for rank in range(3))
        assert results[0][0].residual[name] == pytest.approx(math.sqrt(residual / own), rel=1e-12)


def test_lossless_compression_has_cosine_one_and_no_residual() -> None:
    ((fidelity, _, _),) = [measure(SingleProcess(), {"name": "topk", "ratio": 1.0, "min_numel": 1})]
    assert all(cosine == pytest.approx(1.0) for cosine in fidelity.cosine.values())
    assert set(fidelity.residual.values()) == {0.0}


class Broken(TopK):
    """Top-k of which one layer's mean is not finite."""

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        mean, new = yield from super().reduce(grad, bucket, state)
        if "1.weight" in bucket.names:
            bucket.split(mean)[bucket.names.index("1.weight")][0] = math.inf
        return mean, new


def test_a_mean_that_is_not_finite_has_no_cosine_and_spoils_no_other_layers() -> None:
    for fidelity, _, _ in simulate(2, lambda comm: measure(comm, Broken(min_numel=1), num_steps=1)):
        assert [name for name, cosine in fidelity.cosine.items() if math.isnan(cosine)] == ["1.weight"]


def test_dense_gradients_are_not_measured() -> None:
    assert [result[0] for result in simulate(2, lambda comm: measure(comm, "dense"))] == [None, None]


@pytest.mark.parametrize("hierarchical", [False, True])
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_to_measure_changes_nothing(compressor: dict[str, Any], hierarchical: bool) -> None:
    spec = {**compressor, "min_numel": 1, "hierarchical": hierarchical}

    def plain(comm: Communicator) -> list[list[torch.Tensor]]:
        optimizer = build(comm, spec)
        return [step(optimizer, number) for number in range(3)]

    measured = simulate(4, lambda comm: measure(comm, spec)[1], local_size=2)
    for ours, theirs in zip(measured, simulate(4, plain, local_size=2), strict=True):
        for step_of_ours, step_of_theirs in zip(ours, theirs, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(step_of_ours, step_of_theirs, strict=True))


def test_a_skipped_step_is_measured_the_next_time() -> None:
    def run(comm: Communicator) -> list[bool]:
        optimizer = build(comm, {"name": "topk", "min_numel": 1})
        meter = FidelityMeter(None, 2, optimizer.reducer.executor)
        optimizer.reducer.meters.append(meter)
        found = []
        for number in range(4):
            with contextlib.ExitStack() as stack:
                if number == 1 and comm.rank == 0:
                    hook = optimizer.model[0].weight.register_hook(lambda grad: grad * math.inf)  # type: ignore[index, union-attr]
                    stack.callback(hook.remove)
                step(optimizer, number)
            found.append(optimizer.reducer.results.get(meter) is not None)
        return found

    assert simulate(2, run) == [[False, False, True, False]] * 2


def test_dense_steps_send_the_velocity_of_dgc() -> None:
    def run(comm: Communicator) -> list[bool]:
        optimizer = build(comm, {"name": "dgc", "min_numel": 1, "ratio": 0.1})
        for number in range(3):
            step(optimizer, number)
        for bucket in optimizer.reducer.buckets:
            bucket.exchange_dense(2)
        found = []
        for number in range(3, 5):
            step(optimizer, number)
            state = optimizer.state_dict()["compression"]["per_rank"]
            found.append(any(bool(tensor.any()) for key, tensor in state.items() if key.endswith("velocity")))
        return found

    assert simulate(2, run) == [[True, False]] * 2


@pytest.mark.parametrize(
    ("world_size", "local_size", "more"),
    [(1, 1, {}), (3, 3, {}), (4, 2, {"hierarchical": True}), (3, 3, {"exchange": "two_stage"})],
    ids=["alone", "flat", "hierarchical", "two stages"],
)
@pytest.mark.parametrize("compressor", TELESCOPING, ids=lambda spec: spec["name"])
def test_dense_steps_send_all_residuals(
    compressor: dict[str, Any], world_size: int, local_size: int, more: dict[str, Any]
) -> None:
    """The sum of all means is then that of all gradients."""
    spec = {**compressor, "min_numel": 1, **({"rank": 1} if compressor["name"] == "powersgd" else {}), **more}

    def run(comm: Communicator) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
        try:
            optimizer = build(comm, spec)
        except ValueError as error:
            pytest.skip(str(error).splitlines()[0])
        means = [step(optimizer, number) for number in range(5)]
        for bucket in optimizer.reducer.buckets:
            bucket.exchange_dense(3)
        means += [step(optimizer, number) for number in range(5, 8)]
        state = optimizer.state_dict()["compression"]["per_rank"]
        left = [tensor for key, tensor in state.items() if key.endswith("residual")]
        compressed = step(optimizer, 8)
        assert not any(tensor.any() for tensor in left)
        wanted = mean_gradients(world_size, 8)
        lossy = not all(torch.allclose(one, other) for one, other in zip(compressed, wanted, strict=True))
        assert lossy or spec["name"] == "dense"
        return means, left

    for means, left in simulate(world_size, run, local_size=local_size):
        assert left or spec["name"] == "dense"
        sent = [sum(parts) for parts in zip(*means, strict=True)]
        total = [sum(parts) for parts in zip(*(mean_gradients(world_size, number) for number in range(8)), strict=True)]
        for one, other in zip(sent, total, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
