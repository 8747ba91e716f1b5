"""Dense inside a node, compressed between nodes: the exchange of any compressor over two kinds of wire.

    node     all-to-all: every parameter goes to the rank of the node that owns it, which averages it in rank order
    across   the compressor's own program, between the ranks that own the same parameters on all nodes
    node     all-gather: the owners' means

A gradient of N bytes then crosses between nodes once a node instead of once a rank, and each rank compresses, and keeps
residuals of, only what it owns. Whole parameters are owned, as some compressors need whole matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from disttrain.collectives import AllGather, AllReduce, AllToAll
from disttrain.compression.algorithms.dense import Dense
from disttrain.compression.base import Bucket, Compressor, NewState, Program, State, dry_run, hashed_seed


def init_state(compressor: Compressor, bucket: Bucket) -> State:
    """The state before the first step; of ``bucket.hierarchy``, if any.

    Every tensor is then this rank's own, with no elements for parameters that other ranks of the node own. What counts
    of a parameter is the mean over the ranks that own it, one on each node.
    """
    hierarchy = bucket.hierarchy
    if hierarchy is None or hierarchy.node_size == 1:
        return compressor.init_state(bucket)
    if hierarchy.num_nodes == 1 or bucket.numel == 0:
        return State()
    parts = _plan(compressor, bucket).parts
    own = parts[hierarchy.node_rank]
    like = own or next(part for part in parts if part is not None)
    state = compressor.init_state(like.bucket)
    for name, (tensor, sizes, _, is_residual) in list(state.tensors.items()):
        if own is None:  # the same names, so that all ranks save alike
            tensor, all_sizes = tensor.new_empty(0), [0] * len(bucket.names)
        else:
            by_index = dict(zip(own.indices, sizes, strict=True))
            all_sizes = [by_index.get(index, 0) for index in range(len(bucket.names))]
        state.add(name, tensor, all_sizes, replicated=False, is_residual=is_residual)
    return state


def reduce(compressor: Compressor, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
    """``compressor.reduce``, by way of ``bucket.hierarchy`` if there is one.

    On one node it is a dense all-reduce, on nodes of one rank the compressor's own program.
    """
    hierarchy = bucket.hierarchy
    if hierarchy is None or hierarchy.node_size == 1:
        return (yield from compressor.reduce(grad, bucket, state))
    if hierarchy.num_nodes == 1 or bucket.numel == 0:
        return (yield from Dense().reduce(grad, bucket, state))
    plan = _plan(compressor, bucket)
    own = plan.parts[hierarchy.node_rank]
    parameters = bucket.split(grad)
    nothing = grad.new_empty(0)

    chunks = [nothing if part is None else torch.cat([parameters[i] for i in part.indices]) for part in plan.parts]
    sizes = [chunk.numel() for chunk in chunks]
    received = yield AllToAll(chunks, group="node", sizes=[sizes[hierarchy.node_rank]] * hierarchy.node_size)
    mean, num_steps = nothing, 0
    new_state: NewState = {}
    if own is not None:
        mean = _mean(received)
        program = compressor.reduce(mean, own.bucket, state)
        result = None
        try:
            while True:
                collective = program.send(result)
                num_steps += 1
                result = yield replace(collective, group="across")
        except StopIteration as stop:
            mean, new_state = stop.value
    assert num_steps <= plan.num_steps, f"{compressor!r} takes more rounds than in its first step"
    for _ in range(plan.num_steps - num_steps):
        yield AllReduce(nothing, group="across")  # crosses no wire
    means = yield AllGather(mean, group="node", sizes=sizes)
    for part, flat in zip(plan.parts, means, strict=True):
        if part is not None:
            for index, one in zip(part.indices, part.bucket.split(flat), strict=True):
                parameters[index].copy_(one)
    return grad, new_state


@dataclass(frozen=True)
class _Part:
    """What one rank of a node owns: the indices of its parameters, ascending, and the bucket that they make."""

    indices: tuple[int, ...]
    bucket: Bucket


@dataclass(frozen=True)
class _Plan:
    """What each rank of the node owns, None where nothing is left for it.

    ``num_steps``: the most collectives that any of their programs takes. The ranks of a node must start alike, and one
    whose own program is shorter fills up with empty ones.
    """

    parts: list[_Part | None]
    num_steps: int


@cache
def _plan(compressor: Compressor, bucket: Bucket) -> _Plan:
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
    return _Plan(parts, max(_num_steps(compressor, part.bucket) for part in parts if part is not None))


def _owned(names: Sequence[str], numels: Sequence[int], node_size: int) -> list[list[int]]:
    """Indices of the parameters of each rank of a node: the largest first, each to whom has the fewest elements."""
    owned: list[list[int]] = [[] for _ in range(node_size)]
    totals = [0] * node_size
    first = hashed_seed(names) % node_size  # another one each bucket, as many buckets hold one large parameter
    for index in sorted(range(len(names)), key=lambda index: (-numels[index], index)):
        owner = min(range(node_size), key=lambda rank: (totals[rank], (rank - first) % node_size))
        owned[owner].append(index)
        totals[owner] += numels[index]
    return [sorted(indices) for indices in owned]


def _num_steps(compressor: Compressor, bucket: Bucket) -> int:
    zeros = torch.zeros(bucket.numel, dtype=bucket.dtype, device=bucket.device)
    num_steps, _ = dry_run(compressor.reduce(zeros, bucket, compressor.init_state(bucket)), bucket)
    return num_steps


def _mean(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean in rank order, added up in float32 at least."""
    total = rows[0].to(torch.promote_types(rows[0].dtype, torch.float32), copy=True)
    for row in rows[1:]:
        total += row
    return total.div_(len(rows)).to(rows[0].dtype)
