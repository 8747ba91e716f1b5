"""What can cross the wire, as plain values.

A compressor yields these, a communicator carries them out, the ledger counts them. By themselves they do nothing.

Each is addressed to a group of ranks, and what it says of ranks is said of those of the group, by their number in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

ReduceOp = Literal["sum", "mean", "min", "max"]
Group = Literal["world", "node", "across"]
"""``world``: all ranks; ``node``: those of this node; ``across``: those with this rank's place in every node."""


@dataclass(frozen=True, eq=False)
class AllReduce:
    """Combine one tensor of equal shape and dtype from every rank; every rank gets the same result, bit for bit.

    The communicator owns ``tensor`` from here on: the result may share its storage. ``mean`` needs a floating dtype.
    """

    tensor: torch.Tensor
    op: ReduceOp = "mean"
    group: Group = "world"


@dataclass(frozen=True, eq=False)
class AllGather:
    """Give every rank the list of all ranks' tensors, in rank order.

    Sizes may differ along dimension 0 (then 8 bytes a rank are exchanged first). ``same_size=True`` is the caller's
    promise that they do not, and saves that round; so do ``sizes``, if all ranks know them: the length along dimension
    0 of what each rank gives.
    """

    tensor: torch.Tensor
    same_size: bool = False
    group: Group = "world"
    sizes: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class AllToAll:
    """Send ``chunks[i]`` to rank i; the result lists what each rank sent here, in rank order.

    Sizes may differ along dimension 0, unless ``same_size=True`` promises that every chunk of every rank is alike.
    ``sizes``, if every rank knows its own, are the lengths along dimension 0 of what each rank sends here.
    """

    chunks: list[torch.Tensor]
    same_size: bool = False
    group: Group = "world"
    sizes: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class Broadcast:
    """Give every rank the tensor of rank ``root``; shape and dtype are equal on all ranks."""

    tensor: torch.Tensor
    root: int = 0
    group: Group = "world"


Collective: TypeAlias = AllReduce | AllGather | AllToAll | Broadcast
Result: TypeAlias = torch.Tensor | list[torch.Tensor]

SIZE_BYTES = 8  # one int64 a rank (or a chunk), exchanged before payloads whose sizes may differ


def sent_bytes(collective: Collective, world_size: int, rank: int) -> int:
    """Bytes that ``rank`` hands to the engine: its payload, and its size where sizes are exchanged first.

    Both numbers are those of the group that the collective is addressed to.
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
    """Bytes that reach ``rank`` from others when the engine uses the bandwidth-optimal algorithm.

    A ring all-reduce of N bytes receives 2 (W-1)/W N, an all-gather the payloads of all the others.
    """
    if world_size == 1:
        return 0
    match collective:
        case AllReduce(tensor):
            return 2 * (world_size - 1) * tensor.nbytes // world_size
        case AllGather() | AllToAll():
            others = sum(int(part.nbytes) for index, part in enumerate(result) if index != rank)
            return others + (SIZE_BYTES * (world_size - 1) if _asks_sizes(collective) else 0)
        case Broadcast(tensor, root):
            return 0 if rank == root else tensor.nbytes


def size_bytes(collective: Collective, world_size: int) -> int:
    """Bytes of the sizes that a rank hands over before its payload: one, or in an all-to-all one for each other."""
    if world_size == 1 or not _asks_sizes(collective):
        return 0
    return SIZE_BYTES * (world_size - 1 if isinstance(collective, AllToAll) else 1)


def num_messages(collective: Collective, world_size: int, rank: int) -> int:
    """Messages that ``rank`` sends by the bandwidth-optimal algorithms: rings, and all pairs in an all-to-all."""
    rounds = 1 + _asks_sizes(collective)
    match collective:
        case AllReduce(tensor):
            return 2 * (world_size - 1) if tensor.numel() else 0
        case AllGather() | AllToAll():
            return rounds * (world_size - 1)
        case Broadcast(tensor, root):
            return world_size - 1 if rank == root and tensor.numel() else 0


def _asks_sizes(collective: Collective) -> bool:
    return isinstance(collective, AllGather | AllToAll) and not collective.same_size and collective.sizes is None
