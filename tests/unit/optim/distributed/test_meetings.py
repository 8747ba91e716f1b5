"""Optimizers whose ranks differ, follow each other, or drop gradients between a loss and its backward pass."""

from __future__ import annotations

import contextlib
import copy
import gc

import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer
from disttrain.comm import Communicator, simulate
from disttrain.errors import UserError
from tests.unit.optim.distributed.test_distributed_optimizer import TEMPLATE, build, data, train


def test_rates_that_differ_by_rank_are_named() -> None:
    def run(comm: Communicator, overlap_step: bool) -> None:
        model, optimizer = build(comm, overlap_step=overlap_step)
        optimizer.param_groups[0]["lr"] *= 1 + comm.rank  # such as a plateau of this rank's own loss
        train(model, optimizer, comm.rank, range(1))

    for overlap_step in (False, True):
        with pytest.raises(UserError, match=r"different settings.*lr=0\.01.*lr=0\.02"):
            simulate(2, lambda comm, overlap_step=overlap_step: run(comm, overlap_step))  # type: ignore[misc]


@pytest.mark.parametrize("overlap_step", [False, True])
def test_a_model_can_be_given_to_a_new_optimizer(overlap_step: bool) -> None:
    def run(ranks: list[int], comm: Communicator | None) -> list[torch.Tensor]:
        model = copy.deepcopy(TEMPLATE).double().eval()
        for lr in (0.1, 0.01):  # the first one lives on until the second is there
            optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            if comm is not None:
                optimizer = DistributedOptimizer(optimizer, model, comm=comm, overlap_step=overlap_step)
            for step in range(2):
                optimizer.zero_grad()
                model(torch.cat([data(rank, step).double() for rank in ranks])).square().mean().backward()
                optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    expected = run([0, 1], None)
    for weights in simulate(2, lambda comm: run([comm.rank], comm)):
        torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("overlap_step", [False, True])
@pytest.mark.parametrize("is_used", [False, True])
def test_ranks_may_let_go_of_an_optimizer_at_different_times(overlap_step: bool, is_used: bool) -> None:
    def run(comm: Communicator) -> list[torch.Tensor]:
        model, first = build(comm, overlap_step=overlap_step)
        train(model, first, comm.rank, range(2))
        second = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.01), model, comm=comm, overlap_step=overlap_step
        )
        if comm.rank == 1:
            del first
            gc.collect()
        train(model, second, comm.rank, range(2, 4))
        if is_used and comm.rank == 0:
            first.step()
        train(model, second, comm.rank, range(4, 5))
        return [parameter.detach() for parameter in model.parameters()]

    if is_used:
        with pytest.raises(UserError, match=r"optimizer 1 .* is used on some ranks and was deleted on others"):
            simulate(2, run)
    else:
        one, other = simulate(2, run)
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_ranks_at_the_steps_of_different_optimizers_are_named() -> None:
    def run(comm: Communicator) -> None:
        both = [build(comm) for _ in range(2)]  # identical in every respect
        for model, optimizer in both if comm.rank == 0 else reversed(both):
            train(model, optimizer, comm.rank, range(1))

    with pytest.raises(UserError, match=r"rank 0 is at the step of optimizer 1 .*rank 1 at that of optimizer 2 "):
        simulate(2, run)


@pytest.mark.parametrize("dropped", ["nothing", "means", "local"])
def test_gradients_may_be_zeroed_between_a_weighted_loss_and_its_backward_pass(dropped: str) -> None:
    def loss(model: nn.Module, rank: int) -> torch.Tensor:
        return model(data(rank, 0).double()).square().mean()

    def run(comm: Communicator) -> list[torch.Tensor | None]:
        model = copy.deepcopy(TEMPLATE).double().eval()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, comm=comm)
        if dropped != "nothing":
            with optimizer.no_sync() if dropped == "local" else contextlib.nullcontext():
                optimizer.scale(loss(model, 5), weight=7.0).backward()
        if dropped == "local":
            optimizer.zero_grad()
        weighted = optimizer.scale(loss(model, comm.rank), weight=1.0 + comm.rank)
        optimizer.zero_grad()
        weighted.backward()
        return [parameter.grad for parameter in model.parameters()]

    model = copy.deepcopy(TEMPLATE).double().eval()
    ((loss(model, 0) + 2 * loss(model, 1)) / 3).backward()
    for grads in simulate(2, run):
        torch.testing.assert_close(grads, [parameter.grad for parameter in model.parameters()])
