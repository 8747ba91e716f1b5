"""The ledger against what really reaches the engine, and against the formulas."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer
from disttrain.collectives import AllGather, AllReduce, AllToAll, Broadcast, Collective
from disttrain.comm import SimulatedCommunicator, simulate
from disttrain.comm.work import Work
from disttrain.reduction import Ledger, Traffic
from disttrain.reduction.exchange import Executor
from tests.support.compressing import case_id

with torch.random.fork_rng():
    torch.manual_seed(0)
    MODEL = nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 5))


class Counting(SimulatedCommunicator):
    """A virtual rank that counts the bytes that its engine's primitives are given and give."""

    counted: list[tuple[int, int]]

    def _note(self, flat: torch.Tensor, sent: int, received: Sequence[int]) -> None:
        self.counted.append((sent * flat.itemsize, (sum(received) - received[self.rank]) * flat.itemsize))

    def _all_reduce(self, flat: torch.Tensor, *arguments: Any) -> Work[torch.Tensor]:
        self.counted.append((flat.nbytes, 2 * (self.world_size - 1) * flat.nbytes // self.world_size))
        return super()._all_reduce(flat, *arguments)

    def _all_gather(self, flat: torch.Tensor, sizes: Sequence[int]) -> Work[torch.Tensor]:
        assert flat.numel() == sizes[self.rank]
        self._note(flat, flat.numel(), sizes)
        return super()._all_gather(flat, sizes)

    def _all_to_all(self, flat: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> Work[torch.Tensor]:
        assert flat.numel() == sum(send)
        self._note(flat, sum(send) - send[self.rank], receive)
        return super()._all_to_all(flat, send, receive)

    def _broadcast(self, flat: torch.Tensor, root: int) -> Work[torch.Tensor]:
        self.counted.append((flat.nbytes, 0) if self.rank == root else (0, flat.nbytes))
        return super()._broadcast(flat, root)


def counting(comm: SimulatedCommunicator) -> Counting:
    comm.__class__ = Counting
    assert isinstance(comm, Counting)
    comm.counted = []  # the groups' copies share it
    return comm


def train(comm: Counting, spec: Any, num_steps: int = 3) -> DistributedOptimizer:
    model = copy.deepcopy(MODEL)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DistributedOptimizer(sgd, model, comm=comm, compressor=spec, bucket_mb=0.002)
    comm.counted.clear()
    for step in range(num_steps):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + comm.rank)
        model(torch.randn(5, 20, generator=generator)).square().mean().backward()
        optimizer.step()
    return optimizer


SPECS: list[dict[str, Any]] = [
    {"name": "dense"},
    {"name": "fp16"},
    {"name": "topk", "ratio": 0.07},
    {"name": "topk", "ratio": 0.07, "exchange": "two_stage"},
    {"name": "qsgd", "exchange": "two_stage"},
    {"name": "efsign", "exchange": "two_stage", "mean_bits": 2},
    {"name": "topk", "ratio": 0.07, "exchange": "two_stage", "mean_bits": 3},
    {"name": "efsign"},
    {"name": "randomk", "ratio": 0.1},
    {"name": "powersgd", "rank": 2},
    {"name": "powersgd", "rank": 2, "alternating": True, "dense_steps": 1},
    {"name": "topk", "hierarchical": True},
    {
        "name": "topk",
        "hierarchical": True,
        "dense_steps": 1,
        "rules": [{"match": "2.*", "use": {"name": "powersgd", "min_numel": 0}}],
    },
    {"name": "dgc", "rules": [{"match": "2.*", "use": {"name": "powersgd", "min_numel": 0}}]},
]


@pytest.mark.parametrize("spec", SPECS, ids=case_id)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_what_is_counted_is_what_reaches_the_engine(spec: dict[str, Any], world_size: int) -> None:
    spec = {"min_numel": 0, **spec}

    def run(comm: SimulatedCommunicator) -> tuple[list[tuple[int, int]], Ledger]:
        comm = counting(comm)
        return comm.counted, train(comm, spec).wire

    for counted, ledger in simulate(world_size, run, local_size=2 if world_size == 4 else None):
        total, numels = ledger.total, {name: p.numel() for name, p in MODEL.named_parameters()}
        assert (total.sent_bytes, total.received_bytes) == tuple(map(sum, zip(*counted, strict=True)))
        assert total.dense_bytes == 3 * 4 * sum(numels.values())
        assert add(ledger.by_compressor.values()) == total
        of_step = [(entry.sent_bytes, entry.received_bytes) for entry in ledger.entries]
        assert tuple(map(sum, zip(*of_step, strict=True))) == (
            ledger.last_step.sent_bytes,
            ledger.last_step.received_bytes,
        )
        shares = ledger.by_parameter()
        assert {name: share.dense_bytes // 4 for name, share in shares.items()} == numels
        both = add(shares.values())
        of_buckets = [entry for entry in ledger.entries if entry.account.bucket is not None]
        assert both.sent_bytes == sum(entry.sent_bytes for entry in of_buckets)
        assert both.received_bytes == sum(entry.received_bytes for entry in of_buckets)


def add(parts: Any) -> Traffic:
    total = Traffic()
    for part in parts:
        total.add(part)
    return total


def test_sizes_that_are_exchanged_first_are_counted() -> None:
    """Compressors avoid them, so the collectives are started by hand."""

    def run(comm: SimulatedCommunicator) -> None:
        comm = counting(comm)
        executor = Executor(comm)
        ledger = executor.ledger
        rows = torch.ones(comm.rank + 1, 3)
        chunks = [torch.ones(comm.rank + index, dtype=torch.float64) for index in range(3)]
        collectives: list[Collective] = [
            AllGather(rows),
            AllGather(torch.ones(5), same_size=True),
            AllGather(rows, sizes=[1, 2, 3]),
            AllToAll(chunks),
            AllToAll([rows[:1]] * 3, same_size=True),
            AllReduce(torch.ones(7, dtype=torch.float16)),
            AllReduce(torch.ones(0)),
            Broadcast(torch.ones(4), root=1),
        ]
        for collective in collectives:
            executor.start(collective).wait()
        ledger.end_step(0)
        assert ledger.last_step.sent_bytes == sum(sent for sent, _ in comm.counted)
        assert ledger.last_step.received_bytes == sum(received for _, received in comm.counted)
        assert [entry.size_bytes for entry in ledger.entries] == [8, 0, 0, 16, 0, 0, 0, 0]
        assert [entry.num_messages for entry in ledger.entries] == [4, 2, 2, 4, 2, 4, 0, 2 if comm.rank == 1 else 0]

    simulate(3, run)


def padded(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bytes_received_are_the_formulas(world_size: int) -> None:
    others = world_size - 1

    def of(spec: dict[str, Any], label: str) -> list[int]:
        def run(comm: SimulatedCommunicator) -> list[int]:
            ledger = train(counting(comm), {"min_numel": 0, **spec}, num_steps=1).wire
            return [entry.received_bytes for entry in ledger.entries if str(entry.account).endswith(label)]

        received = simulate(world_size, run)
        assert received == [received[0]] * world_size
        return received[0]

    def ring(num_elements: int) -> int:
        return 2 * others * 4 * num_elements // world_size

    # Buckets close at 2 kB: the last two layers' parameters make the first bucket, the first layer's the other.
    assert of({"name": "dense"}, "dense") == [ring(85 + 5 + 561 + 17), ring(660 + 33)]
    numels = [85 + 561, 660]
    ks = [round(0.07 * numel) for numel in numels]
    assert of({"name": "topk", "ratio": 0.07}, "topk") == [2 * others * padded(4 * k) for k in ks]
    powersgd = of({"name": "powersgd", "rank": 2, "min_compression": 1}, "powersgd")
    assert powersgd == [ring(2 * n) for n in (5 + 17, 33, 17 + 33, 20)], "P of both buckets, then Q"
    blocks = [-(-numel // world_size // 64) for numel in numels]  # of a rank's chunk: a byte an entry, and a scale
    sections = [64 * number + padded(4 * number) for number in blocks]
    blockwise = of({"name": "blockwise8", "block_size": 64, "exchange": "two_stage"}, "blockwise8")
    assert blockwise == 2 * [others * section for section in sections], "to the owners, and back to all"
    blocks = [math.ceil(math.ceil(numel / world_size) / 256) for numel in numels]  # of a rank's chunk of the mean
    sections = [padded(4) + 4096 // 8 for _ in numels]  # one block of signs is longer than any chunk
    for bits in (2, 3, 4, 8):
        means = [padded(4 * number * (2 if bits == 2 else 1)) + 32 * bits * number for number in blocks]
        efsign = of({"name": "efsign", "exchange": "two_stage", "mean_bits": bits}, "efsign")
        assert efsign == [others * section for section in [*sections, *means]], f"{bits} bits on the way back"


def test_the_table_names_buckets_compressors_and_collectives() -> None:
    spec = {"name": "topk", "ratio": 0.07, "min_numel": 600, "dense_steps": 1}
    tables = simulate(2, lambda comm: [train(counting(comm), spec, num_steps).wire.table() for num_steps in (1, 2)])
    warming, table = tables[0]
    assert "topk" not in warming
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["collective", "group", "dtype", "sent", "received", "sizes", "messages"]
    of_buckets = [line[2:] for line in lines if line[0] == "bucket"]
    assert ["topk", "AllGather", "world", "uint8", "384", "384", "0", "1"] in of_buckets
    assert lines[-1][:4] == ["agreement", "AllReduce", "world", "int32"]
