"""N ranks without compression are one process on the joined batch: float64, to 1e-10."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer
from disttrain.comm import Communicator, simulate

NUM_STEPS = 12
Build = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


class Net(nn.Module):
    """A convolution, an embedding used twice (shared with the head), a parameter never used, one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.embedding = nn.Embedding(10, 6)
        self.norm = nn.LayerNorm(6)
        self.never_used = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens) + self.conv(signal).mean(2)
        return self.head(torch.tanh(self.frozen(self.norm(hidden)) * self.scale))


with torch.random.fork_rng():
    torch.manual_seed(3)
    TEMPLATE = Net().double()


def make_net() -> nn.Module:
    return copy.deepcopy(TEMPLATE)  # virtual ranks share the global random generator, so none of them may draw from it


def batch(step: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens, labels = torch.randint(0, 10, (2, size), generator=generator)
    return tokens, torch.randn(size, 4, 5, generator=generator, dtype=torch.float64), labels


def mean_loss(net: nn.Module, samples: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    tokens, signal, labels = samples
    return nn.functional.cross_entropy(net(tokens, signal), labels)


@dataclass(frozen=True)
class Plan:
    optimizer: str = "nesterov"
    batch_sizes: tuple[int, ...] = (24,)
    accumulation: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    bucket_mb: float | None = 0.0005  # so that the small net has several buckets


def parameters_of(net: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])


def one_process(plan: Plan) -> torch.Tensor:
    """Plain torch, nothing of ours."""
    net = make_net()
    optimizer = OPTIMIZERS[plan.optimizer]([p for p in net.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        mean_loss(net, batch(step, plan.batch_sizes[step % len(plan.batch_sizes)])).backward()
        if plan.clip_value is not None:
            torch.nn.utils.clip_grad_value_(net.parameters(), plan.clip_value)
        if plan.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), plan.clip_norm)
        optimizer.step()
        scheduler.step()
    return parameters_of(net)


def one_of_many(plan: Plan, comm: Communicator) -> torch.Tensor:
    """Every micro-batch is split over the ranks as evenly as it goes; losses are weighted by their samples."""
    net = make_net()
    if comm.rank != 0:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(1.0)  # rank 0's values must win
    optimizer = DistributedOptimizer(
        OPTIMIZERS[plan.optimizer]([p for p in net.parameters() if p.requires_grad]),
        net,
        comm=comm,
        clip_norm=plan.clip_norm,
        clip_value=plan.clip_value,
        bucket_mb=plan.bucket_mb,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
    for step in range(NUM_STEPS):
        size = plan.batch_sizes[step % len(plan.batch_sizes)]
        pieces = torch.arange(size).tensor_split(plan.accumulation * comm.world_size)
        mine = [pieces[micro * comm.world_size + comm.rank] for micro in range(plan.accumulation)]
        samples = batch(step, size)
        optimizer.zero_grad()
        for micro, indices in enumerate(mine):
            if len(indices) == 0:
                continue
            loss = mean_loss(net, tuple(part[indices] for part in samples))  # type: ignore[arg-type]
            loss = loss * len(indices) * comm.world_size / size
            if micro < plan.accumulation - 1:
                with optimizer.no_sync():
                    loss.backward()
            else:
                loss.backward()
        optimizer.step()
        scheduler.step()
    return parameters_of(net)


def assert_equal(plan: Plan, world_size: int) -> None:
    wanted = one_process(plan)
    results = simulate(world_size, lambda comm: one_of_many(plan, comm))
    for result in results:
        assert torch.equal(result, results[0]), "replicas are bit-identical"
    torch.testing.assert_close(results[0], wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer: str, world_size: int) -> None:
    assert_equal(Plan(optimizer), world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "plan",
    [
        Plan(accumulation=3),
        Plan(clip_norm=0.05),
        Plan(clip_norm=0.05, accumulation=2, optimizer="adamw"),
        Plan(batch_sizes=(24, 24, 7, 2)),
        Plan(batch_sizes=(9, 1), accumulation=2, clip_norm=0.1),
        Plan(clip_value=0.002),
        Plan(clip_value=0.002, clip_norm=0.01, accumulation=2),
        Plan(clip_value=0.002, optimizer="adamw", batch_sizes=(9, 1)),
        Plan(bucket_mb=None),
        Plan(bucket_mb=1e-9),
    ],
    ids=str,
)
def test_accumulation_clipping_uneven_batches_and_buckets(plan: Plan, world_size: int) -> None:
    assert_equal(plan, world_size)


def test_an_optimizer_that_evaluates_a_closure() -> None:
    samples = batch(0, 24)

    def train(comm: Communicator | None) -> torch.Tensor:
        net = make_net()
        inner: Any = torch.optim.LBFGS(
            [p for p in net.parameters() if p.requires_grad], max_iter=8, line_search_fn="strong_wolfe"
        )
        optimizer = inner if comm is None else DistributedOptimizer(inner, net, comm=comm)
        mine = samples if comm is None else tuple(part.chunk(comm.world_size)[comm.rank] for part in samples)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = mean_loss(net, mine)  # type: ignore[arg-type]
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        return parameters_of(net)

    for result in simulate(3, train):
        torch.testing.assert_close(result, train(None), rtol=0, atol=1e-7)  # line search amplifies rounding
