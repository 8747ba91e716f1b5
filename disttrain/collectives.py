"""Collectives as plain values, and the bytes and messages that they cost.

Compressors yield them, communicators carry them out, and the ledger counts them. Each is addressed to a group of ranks.
Within it, "rank" means the rank in the group, and "all ranks" means the ranks of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

ReduceOp = Literal["sum", "mean", "min", "max"]
Group = Literal["world", "node", "across"]
"""``world``: all ranks; ``node``: the ranks of this node; ``across``: every node's rank at this rank's position."""


@dataclass(frozen=True, eq=False)
class AllReduce:
    """Reduce tensors of equal shape and dtype over all ranks. Every rank gets the same result, bit for bit.

    The communicator takes ownership of ``tensor``: the result may share its storage. ``mean`` needs a floating dtype.
    """

    tensor: torch.Tensor
    op: ReduceOp = "mean"
    group: Group = "world"


@dataclass(frozen=True, eq=False)
class AllGather:
    """Give every rank the list of all ranks' tensors, in rank order.

    Sizes may differ along dimension 0; then 8 bytes per rank are exchanged first. To skip this round, set
    ``same_size=True`` if all sizes are equal, or ``sizes``, the length of each rank's tensor along dimension 0, if all
    ranks know it.
    """

    tensor: torch.Tensor
    same_size: bool = False
    group: Group = "world"
    sizes: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class AllToAll:
    """Send ``chunks[i]`` to rank i. The result is the list of chunks received from each rank, in rank order.

    Sizes may differ along dimension 0; then they are exchanged first. To skip this round, set ``same_size=True`` if all
    chunks of all ranks have the same size, or ``sizes``, the length along dimension 0 of the chunk from each rank, if
    every rank knows it.
    """

    chunks: list[torch.Tensor]
    same_size: bool = False
    group: Group = "world"
    sizes: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class Broadcast:
    """Give every rank the tensor of rank ``root``. Shape and dtype are the same on all ranks."""

    tensor: torch.Tensor
    root: int = 0
    group: Group = "world"


Collective: TypeAlias = AllReduce | AllGather | AllToAll | Broadcast
Result: TypeAlias = torch.Tensor | list[torch.Tensor]

SIZE_BYTES = 8  # one int64 per rank (or chunk), exchanged before payloads whose sizes may differ


def sent_bytes(collective: Collective, world_size: int, rank: int) -> int:
    """Return the bytes that ``rank`` passes to the engine: its payload, and its size if sizes are exchanged first.

    ``world_size`` and ``rank`` are those of the collective's group.
    """
    if world_size == 1:
        return 0
    match collective:
        case AllReduce(tensor):
            return tensor.nbytes
        case AllGather(tensor):
            return tensor.nbytes + size_bytes(collective, world_size)
        case AllToAll(chunks):
            others = sum(chunk.nbytes for index, chunk in enumerate(chunks) if index != rank)
            return others + size_bytes(collective, world_size)
        case Broadcast(tensor, root):
            return tensor.nbytes if rank == root else 0


def received_bytes(collective: Collective, result: Result, world_size: int, rank: int) -> int:
    """Return the bytes that ``rank`` receives from others if the engine uses the bandwidth-optimal algorithm.

    A ring all-reduce of N bytes receives 2 (W-1)/W N, an all-gather the payloads of all other ranks.
    """
    if world_size == 1:
        return 0
    match collective:
        case AllReduce(tensor):
            return 2 * (world_size - 1) * tensor.nbytes // world_size
        case AllGather() | AllToAll():
            others = sum(int(part.nbytes) for index, part in enumerate(result) if index != rank)
            return others + (SIZE_BYTES * (world_size - 1) if _exchanges_sizes(collective) else 0)
        case Broadcast(tensor, root):
            return 0 if rank == root else tensor.nbytes


def size_bytes(collective: Collective, world_size: int) -> int:
    """Return the bytes of the sizes that a rank sends before its payload: one size, or W-1 sizes in an all-to-all."""
    if world_size == 1 or not _exchanges_sizes(collective):
        return 0
    return SIZE_BYTES * (world_size - 1 if isinstance(collective, AllToAll) else 1)


def num_messages(collective: Collective, world_size: int, rank: int) -> int:
    """Return the messages that ``rank`` sends with bandwidth-optimal algorithms: rings, or pairs in an all-to-all."""
    rounds = 1 + _exchanges_sizes(collective)
    match collective:
        case AllReduce(tensor):
            return 2 * (world_size - 1) if tensor.numel() else 0
        case AllGather() | AllToAll():
            return rounds * (world_size - 1)
        case Broadcast(tensor, root):
            return world_size - 1 if rank == root and tensor.numel() else 0


def _exchanges_sizes(collective: Collective) -> bool:
    return isinstance(collective, AllGather | AllToAll) and not collective.same_size and collective.sizes is None
