"""Exchange dense inside a node and compressed between nodes, with any compressor.

    node     all-to-all: every parameter goes to the rank of the node that owns it, which averages it in rank order
    across   the compressor's own program, between the ranks that own the same parameters on all nodes
    node     all-gather: the means of the owners

A gradient of N bytes then crosses between nodes once a node instead of once a rank, and each rank compresses, and keeps
residuals of, only the parameters that it owns. Ownership is by whole parameters, since some compressors need whole
matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from disttrain.collectives import AllGather, AllReduce, AllToAll
from disttrain.compression.algorithms.dense import Dense
from disttrain.compression.base import Bucket, Compressor, NewState, Program, State, hashed_seed


@dataclass(frozen=True)
class _Part:
    """What one rank of a node owns: the indices of its parameters, ascending, and the bucket of these parameters."""

    indices: tuple[int, ...]
    bucket: Bucket


class _OwnerState(State):
    """The state of the parameters that this rank owns.

    Attributes:
        parts: what each rank of the node owns, None if that is nothing.
    """

    def __init__(self, parts: Sequence[_Part | None]) -> None:
        super().__init__()
        self.parts = parts
        self._num_rounds: dict[Compressor, int] = {}

    def num_rounds(self, compressor: Compressor) -> int:
        """Return the largest number of rounds of any rank's program."""
        if compressor not in self._num_rounds:
            rounds = [compressor.num_rounds(part.bucket) for part in self.parts if part is not None]
            self._num_rounds[compressor] = max(rounds)
        return self._num_rounds[compressor]


def init_state(compressor: Compressor, bucket: Bucket) -> State:
    """Return the state before the first step; with a hierarchy, of the parameters that this rank owns.

    Every tensor is then this rank's own, without elements for parameters that other ranks of the node own. What counts
    for a parameter is the mean over the ranks that own it, one on each node.
    """
    hierarchy = bucket.hierarchy
    if hierarchy is None or hierarchy.node_size == 1:
        return compressor.init_state(bucket)
    if hierarchy.num_nodes == 1 or bucket.numel == 0:
        return State()
    parts = _split(bucket)
    state = _OwnerState(parts)
    own = parts[hierarchy.node_rank]
    model = own or next(part for part in parts if part is not None)
    for name, (tensor, sizes, _, is_residual) in compressor.init_state(model.bucket).tensors.items():
        all_sizes = [0] * len(bucket.names)
        if own is None:  # declare the same names as the other ranks, so that all ranks save the same keys
            tensor = tensor.new_empty(0)
        else:
            for index, size in zip(own.indices, sizes, strict=True):
                all_sizes[index] = size
        state.add(name, tensor, all_sizes, replicated=False, is_residual=is_residual)
    return state


def reduce(compressor: Compressor, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
    """``compressor.reduce``, through ``bucket.hierarchy`` if there is one.

    On one node this is a dense all-reduce, on nodes of one rank the compressor's own program.
    """
    hierarchy = bucket.hierarchy
    if hierarchy is None or hierarchy.node_size == 1:
        return (yield from compressor.reduce(grad, bucket, state))
    if hierarchy.num_nodes == 1 or bucket.numel == 0:
        return (yield from Dense().reduce(grad, bucket, state))
    assert isinstance(state, _OwnerState), "the state of a hierarchical exchange comes from hierarchical.init_state"
    own = state.parts[hierarchy.node_rank]
    parameters = bucket.split(grad)
    empty = grad.new_empty(0)

    chunks = [empty if part is None else torch.cat([parameters[i] for i in part.indices]) for part in state.parts]
    sizes = [chunk.numel() for chunk in chunks]
    received = yield AllToAll(chunks, group="node", sizes=[sizes[hierarchy.node_rank]] * hierarchy.node_size)
    mean, num_rounds = empty, 0
    new_state: NewState = {}
    if own is not None:
        mean = _mean(received)
        program = compressor.reduce(mean, own.bucket, state)
        result = None
        try:
            while True:
                collective = program.send(result)
                num_rounds += 1
                result = yield replace(collective, group="across")
        except StopIteration as stop:
            mean, new_state = stop.value
    # The ranks of a node must start the same collectives, but their programs may differ in length.
    declared = state.num_rounds(compressor)
    assert num_rounds <= declared, f"{compressor!r} took {num_rounds} rounds; its num_rounds() says {declared}"
    for _ in range(declared - num_rounds):
        yield AllReduce(empty, group="across")  # sends nothing
    means = yield AllGather(mean, group="node", sizes=sizes)
    for part, flat in zip(state.parts, means, strict=True):
        if part is not None:
            for index, one in zip(part.indices, part.bucket.split(flat), strict=True):
                parameters[index].copy_(one)
    return grad, new_state


def _split(bucket: Bucket) -> list[_Part | None]:
    """Return what each rank of the node owns; None if that is nothing, or only empty parameters."""
    hierarchy = bucket.hierarchy
    assert hierarchy is not None
    parts: list[_Part | None] = []
    for indices in _owned(bucket.names, bucket.numels, hierarchy.node_size):
        part = replace(
            bucket,
            names=tuple(bucket.names[index] for index in indices),
            shapes=tuple(bucket.shapes[index] for index in indices),
            rank=hierarchy.across_rank,
            world_size=hierarchy.num_nodes,
            hierarchy=None,
        )
        parts.append(_Part(tuple(indices), part) if part.numel else None)
    return parts


def _owned(names: Sequence[str], numels: Sequence[int], node_size: int) -> list[list[int]]:
    """Assign parameters to the ranks of a node, and return the indices of each rank's parameters.

    The largest parameter goes first, each to the rank that has the fewest elements.
    """
    owned: list[list[int]] = [[] for _ in range(node_size)]
    totals = [0] * node_size
    first = hashed_seed(names) % node_size  # differs by bucket, since many buckets have one large parameter
    for index in sorted(range(len(names)), key=lambda index: (-numels[index], index)):
        owner = min(range(node_size), key=lambda rank: (totals[rank], (rank - first) % node_size))
        owned[owner].append(index)
        totals[owner] += numels[index]
    return [sorted(indices) for indices in owned]


def _mean(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean, summed in rank order and in float32 at least."""
    total = rows[0].to(torch.promote_types(rows[0].dtype, torch.float32), copy=True)
    for row in rows[1:]:
        total += row
    return total.div_(len(rows)).to(rows[0].dtype)
