"""The distributed optimizer as its users see it."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer, UserError, compression
from disttrain.comm import Communicator, SingleProcess, simulate

with torch.random.fork_rng():
    torch.manual_seed(0)
    TEMPLATE = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3))


def build(comm: Communicator, **options: Any) -> tuple[nn.Module, DistributedOptimizer]:
    model = copy.deepcopy(TEMPLATE)
    return model, DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), model, comm=comm, **options)


def data(rank: int, step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(100 * step + rank))


def train(model: nn.Module, optimizer: DistributedOptimizer, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(data(rank, step)).square().mean().backward()
        optimizer.step()


def test_is_an_optimizer_and_schedulers_take_it() -> None:
    _, optimizer = build(SingleProcess())
    assert isinstance(optimizer, torch.optim.Optimizer)
    for scheduler in (
        torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10),
        torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)],
            milestones=[2],
        ),
    ):
        optimizer.zero_grad()
        optimizer.step()
        scheduler.step()
        assert optimizer.inner.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    before = optimizer.param_groups[0]["lr"]
    for loss in (1.0, 2.0, 3.0):
        plateau.step(loss)
    assert optimizer.inner.param_groups[0]["lr"] < before
    assert "AdamW" in repr(optimizer)


@pytest.mark.parametrize("name", compression.names())
def test_state_survives_saving_loading_and_other_buckets(name: str) -> None:
    """Resume equals no stop, bit for bit; state is kept by parameter, so buckets may change for compressors."""

    def run(comm: Communicator) -> bool:
        spec = {"name": name, "min_numel": 0}
        straight_model, straight = build(comm, compressor=spec)
        train(straight_model, straight, comm.rank, range(6))

        model, optimizer = build(comm, compressor=spec)
        train(model, optimizer, comm.rank, range(3))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)

        resumed_model, resumed = build(comm, compressor=spec)
        resumed_model.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        train(resumed_model, resumed, comm.rank, range(3, 6))

        _, rebucketed = build(comm, compressor=spec, bucket_mb=1e-6)
        rebucketed.load_state_dict(saved["optimizer"])
        again, before = rebucketed.state_dict()["compression"], saved["optimizer"]["compression"]
        same_state = all(
            torch.equal(again[kind][key], value)
            for kind in ("replicated", "per_rank")
            for key, value in before[kind].items()
        )
        return same_state and all(
            torch.equal(a, b) for a, b in zip(straight_model.parameters(), resumed_model.parameters(), strict=True)
        )

    assert simulate(2, run) == [True, True]


def test_residuals_of_another_rank_are_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    def run(comm: Communicator) -> tuple[dict[str, Any], bool]:
        model, optimizer = build(comm, compressor={"name": "topk", "min_numel": 0})
        train(model, optimizer, comm.rank, range(2))
        everyone = comm.all_gather(optimizer.state_dict()["compression"]["per_rank"]["0.weight/residual"])
        state = optimizer.state_dict()
        state["compression"]["rank"] = 0
        state["compression"]["per_rank"]["0.weight/residual"] = everyone[0].clone()
        _, resumed = build(comm, compressor={"name": "topk", "min_numel": 0})
        resumed.load_state_dict(state)
        taken = resumed.state_dict()["compression"]["per_rank"]["0.weight/residual"]
        return torch.equal(taken, everyone[0]), not taken.any()

    with caplog.at_level(logging.WARNING, "disttrain"):
        assert simulate(2, run) == [(True, False), (False, True)]
    assert "start at zero" in caplog.text


def test_plain_optimizer_state_can_be_loaded_and_a_wrong_one_is_refused() -> None:
    model, optimizer = build(SingleProcess(), compressor={"name": "topk", "min_numel": 0})
    train(model, optimizer, 0, range(2))
    state = optimizer.state_dict()
    _, plain = build(SingleProcess())
    with pytest.raises(UserError, match="compressor"):
        plain.load_state_dict(state)
    plain.load_state_dict({key: value for key, value in state.items() if key != "compression"})


def test_clips_the_mean_gradient_after_synchronize() -> None:
    def run(comm: Communicator) -> tuple[float, float, float]:
        model, optimizer = build(comm)
        model(100 * data(comm.rank, 0)).square().mean().backward()
        optimizer.synchronize()
        before = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        reported = float(optimizer.clip_grad_norm_(0.01))
        return (
            before,
            reported,
            float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])),
        )

    results = simulate(2, run)
    assert results[0] == results[1]
    before, reported, after = results[0]
    assert reported == pytest.approx(before, rel=1e-5)
    assert after == pytest.approx(0.01, rel=1e-3)


def test_buffers_are_averaged_on_request() -> None:
    def run(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model, optimizer = build(comm)
        train(model, optimizer, comm.rank, range(2))
        own = model[1].running_mean.clone()
        optimizer.synchronize_buffers()
        return own, model[1].running_mean, model[1].num_batches_tracked

    results = simulate(3, run)
    mean = torch.stack([own for own, _, _ in results]).mean(0)
    for _, averaged, count in results:
        torch.testing.assert_close(averaged, mean)
        assert torch.equal(averaged, results[0][1])
        assert count == 2


def test_the_step_hooks_of_the_wrapped_optimizer_are_called() -> None:
    _, optimizer = build(SingleProcess())
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.zero_grad()
    optimizer.step()
    assert calls == ["after"]


def test_the_ledger_counts_dense_bytes() -> None:
    def run(comm: Communicator) -> tuple[int, int, int]:
        model, optimizer = build(comm, clip_norm=1.0)
        train(model, optimizer, comm.rank, range(3))
        total = optimizer.wire.total
        numel = sum(p.numel() for p in model.parameters())
        assert optimizer.wire.last_step.dense_bytes == 4 * numel
        return total.sent_bytes - total.dense_bytes, total.dense_bytes - 3 * 4 * numel, total.num_collectives

    for agreement_bytes, difference, num_collectives in simulate(2, run):
        assert difference == 0
        assert 0 < agreement_bytes < 3 * 2 * 128, "only what ranks say where they meet, after backward and at the step"
        assert num_collectives == 9


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_largest_vote_reaches_all_ranks_with_the_step_that_it_was_given_in(world_size: int) -> None:
    def run(comm: Communicator) -> tuple[list[int], set[int]]:
        model, optimizer = build(comm)
        agreed, num_collectives = [], set()
        for step in range(4):
            if comm.rank == world_size - 1:
                optimizer.vote = (0, 1, 255, 0)[step]
            train(model, optimizer, comm.rank, range(step, step + 1))
            agreed.append(optimizer.agreed_vote)
            num_collectives.add(optimizer.wire.last_step.num_collectives)
        assert optimizer.skipped_steps == 0
        return agreed, num_collectives

    assert simulate(world_size, run) == [([0, 1, 255, 0], {3})] * world_size


def test_skipped_steps_in_a_row_are_reported_ever_more_rarely(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = build(SingleProcess())

    def step(value: float) -> int:
        """How many messages it gave."""
        caplog.clear()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.step()
        return len(caplog.records)

    with caplog.at_level(logging.WARNING, "disttrain"):
        assert [index for index in range(1, 40) if step(math.nan)] == [*range(1, 11), 16, 32]
        assert step(1.0) == 0
        assert step(math.inf) == 1
        assert "(40 so far)" in caplog.text
        assert (optimizer.skipped_steps, optimizer.consecutive_skipped_steps) == (40, 1)


def test_refuses_what_cannot_work() -> None:
    comm = SingleProcess()
    model = copy.deepcopy(TEMPLATE)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    other = nn.Linear(2, 2)
    with pytest.raises(UserError, match="not the model's"):
        DistributedOptimizer(torch.optim.SGD(other.parameters(), lr=0.1), model, comm=comm)
    with pytest.raises(UserError, match="already"):
        DistributedOptimizer(DistributedOptimizer(sgd, model, comm=comm), model, comm=comm)
    with pytest.raises(UserError, match="SparseAdam"):
        DistributedOptimizer(torch.optim.SparseAdam(other.parameters()), other, comm=comm)
    with pytest.raises(UserError, match="did you mean"):
        DistributedOptimizer(sgd, model, comm=comm, compressor="power_sgd")
    with pytest.raises(UserError, match="clip_norm"):
        DistributedOptimizer(sgd, model, comm=comm, clip_norm=-1.0)
    with pytest.raises(UserError, match="clip_value"):
        DistributedOptimizer(sgd, model, comm=comm, clip_value=0.0)
    with pytest.raises(UserError, match="bucket_mb"):
        DistributedOptimizer(sgd, model, comm=comm, bucket_mb=0.0)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        DistributedOptimizer(torch.optim.SGD(frozen.parameters(), lr=0.1), frozen, comm=comm)
    odd = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(UserError, match="complex"):
        DistributedOptimizer(torch.optim.SGD(odd.parameters(), lr=0.1), odd, comm=comm)
    optimizer = DistributedOptimizer(sgd, model, comm=comm)
    with pytest.raises(UserError, match="not the model's"):
        optimizer.add_param_group({"params": list(other.parameters())})


def test_a_parameter_that_comes_to_require_a_gradient_is_exchanged() -> None:
    def run(comm: Communicator) -> tuple[torch.Tensor | None, torch.Tensor]:
        model = copy.deepcopy(TEMPLATE)
        model[0].requires_grad_(False)
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
        train(model, optimizer, comm.rank, range(1))
        optimizer.zero_grad()
        model[0].requires_grad_(True)
        model(data(comm.rank, 1)).square().mean().backward()
        mean = model[0].weight.grad
        optimizer.step()
        return mean, model[0].weight.detach()

    (first, weight), (second, other) = simulate(2, run)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert torch.equal(weight, other)
    assert not torch.equal(weight, TEMPLATE[0].weight)


def test_models_that_differ_are_named() -> None:
    def run(comm: Communicator) -> None:
        model = nn.Sequential(nn.Linear(4, 4 + comm.rank))
        DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)

    with pytest.raises(UserError, match=r"0\.weight.*rank 1 has"):
        simulate(2, run)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.LazyLinear(2), "'0.weight' is of a lazy module and has no shape yet: run one forward pass"),
        (lambda: nn.LazyBatchNorm1d(affine=False), "'0.running_mean' is of a lazy module and has no shape yet"),
        (lambda: nn.Linear(3, 2, device="meta"), "'0.weight' is on the meta device and has no values: call model.to_e"),
    ],
)
def test_a_model_without_values_is_refused_on_all_ranks(make: Callable[[], nn.Module], message: str) -> None:
    def run(comm: Communicator) -> str:
        first = make() if comm.rank == 1 else nn.Linear(3, 2)
        model = nn.Sequential(first, nn.Linear(2, 2))
        with pytest.raises(UserError) as caught:
            DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
        return str(caught.value)

    for found in simulate(2, run):
        assert found.startswith(message)


def test_a_lazy_model_trains_after_one_forward_pass() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    model(torch.ones(1, 3))
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=SingleProcess())
    before = model[0].weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model[0].weight, before - 0.1)


def test_dropping_gradients_that_are_on_the_wire() -> None:
    def run(comm: Communicator) -> torch.Tensor:
        model, optimizer = build(comm)
        model(data(comm.rank, 0)).square().mean().backward()
        optimizer.zero_grad()  # the user thinks better of it
        train(model, optimizer, comm.rank, range(1, 3))
        return torch.cat([p.detach().view(-1) for p in model.parameters()])

    results = simulate(2, run)
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("synchronize_first", [False, True])
@pytest.mark.parametrize("passes", [1, 2])  # two without no_sync: a second exchange follows
def test_values_are_clipped_in_the_mean_in_every_mode(synchronize_first: bool, passes: int) -> None:
    def run(comm: Communicator, clip_value: float | None) -> list[torch.Tensor]:
        model = copy.deepcopy(TEMPLATE).eval()
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = DistributedOptimizer(sgd, model, comm=comm, clip_value=clip_value, bucket_mb=1e-4)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for index in range(passes):
            model(10 * data(comm.rank, index)).square().mean().backward()
        if synchronize_first:
            optimizer.synchronize()
        optimizer.step()
        return [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]

    clipped, free = (simulate(2, lambda comm, v=v: run(comm, v))[0] for v in (0.05, None))  # type: ignore[misc]
    assert max(change.abs().max() for change in free) > 0.1
    for ours, unbounded in zip(clipped, free, strict=True):
        torch.testing.assert_close(ours, unbounded.clamp(-0.05, 0.05), rtol=1e-5, atol=1e-6)


def test_weights_of_ranks_whose_passes_are_all_local_are_counted() -> None:
    """Rank 1 has no last pass: what it holds has to wait for the weights, and then for the gradients, of rank 0's."""
    passes = [[(0, 3.0), (1, 1.0)], [(2, 5.0)]]  # of each rank: batch, weight

    def loss(model: nn.Module, batch: int) -> torch.Tensor:
        return model(data(0, batch).double()).square().mean()

    def run(comm: Communicator) -> list[torch.Tensor | None]:
        model = copy.deepcopy(TEMPLATE).double().eval()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, comm=comm)
        for index, (batch, weight) in enumerate(passes[comm.rank]):
            with optimizer.no_sync() if index == 0 else contextlib.nullcontext():
                optimizer.scale(loss(model, batch), weight=weight).backward()
        optimizer.step()
        return [parameter.grad for parameter in model.parameters()]

    model = copy.deepcopy(TEMPLATE).double().eval()
    (sum(weight * loss(model, batch) for of_rank in passes for batch, weight in of_rank) / 9.0).backward()  # type: ignore[union-attr]
    for grads in simulate(2, run):
        torch.testing.assert_close(grads, [parameter.grad for parameter in model.parameters()])
