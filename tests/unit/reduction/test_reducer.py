"""The reducer: order, overlap, gradients of every kind, and steps that must leave no trace."""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer, compression
from disttrain.collectives import AllReduce, Collective
from disttrain.comm import Communicator, SimulatedCommunicator, SimulatedWorld, SingleProcess, simulate
from disttrain.comm.work import Work

with torch.random.fork_rng():
    torch.manual_seed(0)
    MLP = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    CONV = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2))

COMPRESSORS = [
    pytest.param({"name": name, **options}, id=name)
    for name, options in {**{name: {} for name in compression.names()}, "topk": {"ratio": 0.1}}.items()
]
# These lose something that is not in a residual: momentum, the signs' sizes, the roundings of a sum in half precision.
NOT_TELESCOPING = {"bf16", "dgc", "fp16", "signsgd"}
TELESCOPING = [
    {
        "name": name,
        **({"error_feedback": True} if "error_feedback" in compression.registry.get(name).model_fields else {}),
    }
    for name in compression.names()
    if name not in NOT_TELESCOPING
]


def build(model: nn.Module, comm: Communicator, **options: Any) -> tuple[nn.Module, DistributedOptimizer]:
    model = copy.deepcopy(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, DistributedOptimizer(sgd, model, comm=comm, **{"bucket_mb": 0.0005, **options})


def inputs(rank: int, step: int = 0, shape: tuple[int, ...] = (5, 8)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def mean_gradient(
    model: nn.Module, world_size: int, loss: Callable[[nn.Module, int], torch.Tensor]
) -> list[torch.Tensor]:
    """What one process computes: the mean of all ranks' losses."""
    model = copy.deepcopy(model)
    (sum(loss(model, rank) for rank in range(world_size)) / world_size).backward()  # type: ignore[union-attr]
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def squares(model: nn.Module, rank: int) -> torch.Tensor:
    return model(inputs(rank)).square().mean()


class Recording(SimulatedCommunicator):
    """A virtual rank that remembers when it started what, and with how many elements."""

    def __init__(self, world: SimulatedWorld, rank: int) -> None:
        super().__init__(world, rank)
        self.log: list[str] = []

    def start(self, collective: Collective, **options: Any) -> Work[Any]:  # type: ignore[override]
        if isinstance(collective, AllReduce):
            self.log.append(f"{collective.op} {collective.tensor.dtype} {collective.tensor.numel()}")
        return super().start(collective, **options)


def test_buckets_leave_while_backward_is_running() -> None:
    comm = Recording(SimulatedWorld(1), 0)
    model, optimizer = build(MLP, comm)
    comm.log.clear()
    first_layer = model[0].weight
    first_layer.register_hook(lambda grad: comm.log.append("first layer's gradient"))
    squares(model, 0).backward()
    position = comm.log.index("first layer's gradient")
    assert position >= 2, "later layers' buckets left before the first layer had its gradient"
    optimizer.step()
    assert len(optimizer.reducer.buckets) >= 3


def test_order_is_by_bucket_and_not_by_readiness() -> None:
    """Each rank uses other layers and is slow at other times; all must start the same collectives."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8 + index, dtype=torch.float64) for index in range(6))

        def forward(self, x: torch.Tensor, order: list[int]) -> torch.Tensor:
            return torch.stack([self.layers[index](x).square().mean() for index in order]).sum()

    template = Branches()
    world = SimulatedWorld(3)
    comms = [Recording(world, rank) for rank in range(3)]
    orders = [[0, 1, 2, 3, 4, 5], [5, 2, 0], [3, 4]]

    def run(rank: int) -> None:
        try:
            model, optimizer = build(template, comms[rank])
            for step in range(4):
                for layer in model.layers:
                    layer.weight.register_hook(lambda grad, pause=(rank + step) % 3: time.sleep(pause / 1000))
                optimizer.zero_grad()
                model(inputs(rank, step), orders[(rank + step) % 3]).backward()
                optimizer.step()
            results[rank] = torch.cat([p.detach().view(-1) for p in model.parameters()])
        except BaseException as error:
            world.fail(error)
            raise

    results: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert comms[0].log == comms[1].log == comms[2].log
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_unused_parameters_count_as_zero_and_stay_none_if_no_rank_has_them() -> None:
    def loss(model: nn.Module, rank: int) -> torch.Tensor:
        x = inputs(rank)
        return model[0](x).square().mean() if rank == 0 else model[2](x.repeat(1, 2)).square().mean()

    def run(comm: Communicator) -> list[torch.Tensor | None]:
        model, optimizer = build(MLP, comm)
        loss(model, comm.rank).backward()
        assert optimizer.synchronize()
        return gradients(model)

    wanted = mean_gradient(MLP, 2, loss)
    for result in simulate(2, run):
        for grad, expected in zip(result[:4], wanted[:4], strict=True):
            torch.testing.assert_close(grad, expected)
        assert result[4:] == [None, None], "as in one process: weight decay must not touch what nobody used"


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_both_ways(set_to_none: bool) -> None:
    def run(comm: Communicator) -> tuple[list[torch.Tensor | None], bool]:
        model, optimizer = build(MLP, comm)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            squares(model, comm.rank).backward()
            optimizer.synchronize()
        result = gradients(model)
        optimizer.zero_grad(set_to_none=set_to_none)
        return result, all(p.grad is None if set_to_none else not p.grad.any() for p in model.parameters())

    wanted = mean_gradient(MLP, 2, squares)
    for result, cleared in simulate(2, run):
        assert cleared
        torch.testing.assert_close(result, wanted)


def test_gradients_are_views_of_the_buckets_and_models_zero_grad_works_too() -> None:
    model, optimizer = build(MLP, SingleProcess())
    for step in range(3):
        model.zero_grad()
        model(inputs(0, step)).square().mean().backward()
        wanted = torch.autograd.grad(model(inputs(0, step)).square().mean(), list(model.parameters()))
        optimizer.synchronize()
        torch.testing.assert_close([p.grad for p in model.parameters()], list(wanted))
        flats = {bucket.flat.untyped_storage().data_ptr() for bucket in optimizer.reducer.buckets}
        assert {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None} == flats
        optimizer.step()


def test_no_sync_sends_the_sum_once() -> None:
    def run(comm: Communicator) -> tuple[list[torch.Tensor | None], int]:
        model, optimizer = build(MLP, comm)
        with optimizer.no_sync():
            model(inputs(comm.rank, 1)).square().mean().backward()
            assert not optimizer.reducer.has_sent
        squares(model, comm.rank).backward()
        optimizer.synchronize()
        means = gradients(model)
        optimizer.step()
        return means, optimizer.wire.last_step.num_collectives

    wanted = mean_gradient(MLP, 2, lambda model, rank: squares(model, rank) + model(inputs(rank, 1)).square().mean())
    for result, num_collectives in simulate(2, run):
        torch.testing.assert_close(result, wanted)
        num_buckets = len(build(MLP, SingleProcess())[1].reducer.buckets)
        assert num_collectives == num_buckets + 3  # ranks meet after the pass, in synchronize and in step


def test_only_no_sync_passes_before_a_step() -> None:
    def run(comm: Communicator) -> list[torch.Tensor | None]:
        model, optimizer = build(MLP, comm)
        with optimizer.no_sync():
            squares(model, comm.rank).backward()
        optimizer.synchronize()
        return gradients(model)

    for result in simulate(2, run):
        torch.testing.assert_close(result, mean_gradient(MLP, 2, squares))


def test_two_backward_passes_before_a_step_on_some_ranks() -> None:
    def loss(model: nn.Module, rank: int) -> torch.Tensor:
        second = model[0](inputs(rank, 1)).square().mean() if rank != 1 else 0.0
        return squares(model, rank) + second

    def run(comm: Communicator) -> list[torch.Tensor | None]:
        model, optimizer = build(MLP, comm)
        squares(model, comm.rank).backward()
        if comm.rank != 1:
            model[0](inputs(comm.rank, 1)).square().mean().backward()
        optimizer.synchronize()
        return gradients(model)

    for result in simulate(3, run):
        torch.testing.assert_close(result, mean_gradient(MLP, 3, loss))


@pytest.mark.parametrize("spec", TELESCOPING, ids=lambda spec: spec["name"])
def test_two_backward_passes_lose_nothing_under_compression(spec: dict[str, Any]) -> None:
    def run(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model, optimizer = build(MLP, comm, compressor={**spec, "min_numel": 0})
        optimizer.param_groups[0]["lr"] = 0.0
        sent = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
        for step in range(3):
            optimizer.zero_grad()
            model(inputs(comm.rank, step)).square().mean().backward()
            model(inputs(comm.rank, step + 5)).square().mean().backward()
            sent += torch.cat([slot.parameter.grad.reshape(-1) for slot in optimizer.reducer.slots])
            optimizer.step()
        per_rank = optimizer.state_dict()["compression"]["per_rank"]
        local = optimizer.reducer.slots
        residuals = [per_rank.get(f"{slot.name}/residual", torch.zeros(slot.view.numel()).double()) for slot in local]
        own = copy.deepcopy(MLP)
        for step in range(3):
            own(inputs(comm.rank, step)).square().mean().backward()
            own(inputs(comm.rank, step + 5)).square().mean().backward()
        by_name = dict(own.named_parameters())
        total = torch.cat([by_name[slot.name].grad.reshape(-1) for slot in local])
        return sent, comm.all_reduce(torch.cat(residuals), "mean"), comm.all_reduce(total, "mean")

    for sent, residual, total in simulate(2, run):
        torch.testing.assert_close(sent + residual, total, rtol=0, atol=1e-10)


@pytest.mark.parametrize("spec", COMPRESSORS)
@pytest.mark.parametrize("poison", [math.inf, math.nan])
@pytest.mark.parametrize("late", [False, True])
def test_a_non_finite_gradient_on_one_rank_leaves_no_trace_on_any(
    spec: dict[str, Any], poison: float, late: bool
) -> None:
    def train(comm: Communicator, steps: list[int | None]) -> tuple[nn.Module, DistributedOptimizer]:
        """Steps are numbers of batches; None is a step that rank 1 spoils."""
        model, optimizer = build(MLP, comm, compressor={**spec, "min_numel": 0}, clip_norm=0.5)
        for step in steps:
            factor = poison if step is None and comm.rank == 1 else 1.0
            loss = model(inputs(comm.rank, 99 if step is None else step)).square().mean()
            optimizer.zero_grad()
            if late and step is None:
                loss.backward(retain_graph=True)
            (factor * loss).backward()
            optimizer.step()
            assert step is not None or all(p.grad is not None and p.grad.isnan().all() for p in model.parameters())
        assert optimizer.skipped_steps == steps.count(None)
        return model, optimizer

    spoilt = simulate(2, lambda comm: train(comm, [0, None, 1, None, 2, 3]))
    clean = simulate(2, lambda comm: train(comm, [0, 1, 2, 3]))
    for (model, optimizer), (clean_model, clean_optimizer) in zip(spoilt, clean, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), clean_model.parameters(), strict=True))
        state, clean_state = optimizer.state_dict(), clean_optimizer.state_dict()
        assert state["compression"]["step"] == clean_state["compression"]["step"] == 4
        for kind in ("replicated", "per_rank"):
            ours, theirs = state["compression"][kind], clean_state["compression"][kind]
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        for index, entry in state["state"].items():
            assert torch.equal(entry["momentum_buffer"], clean_state["state"][index]["momentum_buffer"])


def test_huge_but_finite_gradients_are_not_taken_for_overflow() -> None:
    model = nn.Linear(2, 2, bias=False)
    _, optimizer = model, DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=SingleProcess())
    model.weight.grad = torch.full((2, 2), 3e38)
    assert optimizer.synchronize()
    model.weight.grad = torch.tensor([[math.inf, -math.inf], [0, 0]])
    optimizer.step()
    model.weight.grad = torch.tensor([[math.inf, -math.inf], [0, 0]])
    assert not optimizer.synchronize()


def test_channels_last_keeps_its_strides() -> None:
    def loss(model: nn.Module, rank: int) -> torch.Tensor:
        x = inputs(rank, 0, (2, 3, 8, 8)).float().to(memory_format=torch.channels_last)
        return model(x).square().mean()

    template = copy.deepcopy(CONV).to(memory_format=torch.channels_last)
    wanted = mean_gradient(template, 2, loss)
    for spec in ("dense", {"name": "topk", "ratio": 1.0, "min_numel": 0}):

        def run(comm: Communicator, spec: Any = spec) -> nn.Module:
            model, optimizer = build(template, comm, compressor=spec)
            loss(model, comm.rank).backward()
            optimizer.synchronize()
            return model

        for model in simulate(2, run):
            for parameter, expected in zip(model.parameters(), wanted, strict=True):
                assert parameter.grad is not None
                assert parameter.grad.stride() == parameter.stride()
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_sparse_embedding_gradients_are_made_dense() -> None:
    def loss(model: nn.Module, rank: int) -> torch.Tensor:
        return model(torch.tensor([rank, 3])).square().sum()

    template = nn.Embedding(10, 4, sparse=True, dtype=torch.float64)
    dense = nn.Embedding.from_pretrained(template.weight.detach().clone(), freeze=False)

    def run(comm: Communicator) -> torch.Tensor:
        model, optimizer = build(template, comm)
        loss(model, comm.rank).backward()
        optimizer.synchronize()
        grad = model.weight.grad.clone()
        model.weight.grad = None
        loss(model, comm.rank).backward()
        loss(model, comm.rank).backward()
        optimizer.synchronize()
        optimizer.step()
        return grad

    for grad in simulate(2, run):
        assert not grad.is_sparse
        torch.testing.assert_close(grad, mean_gradient(dense, 2, loss)[0])


def test_gradients_left_alone_accumulate_as_in_one_process() -> None:
    def run(comm: Communicator) -> list[torch.Tensor | None]:
        model, optimizer = build(MLP, comm)
        for _ in range(2):
            squares(model, comm.rank).backward()
            optimizer.reducer.synchronize()
        return gradients(model)

    wanted = [2 * grad for grad in mean_gradient(MLP, 2, squares)]
    for result in simulate(2, run):
        torch.testing.assert_close(result, wanted)
