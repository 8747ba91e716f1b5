"""All virtual ranks in one thread: their programs run in step, and what they yield is combined by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from disttrain.collectives import AllGather, AllReduce, AllToAll, Broadcast, Collective
from disttrain.compression import NewState, Program


@dataclass
class Outcome:
    """What one rank's program came to, and the collectives that it started on the way."""

    mean: torch.Tensor
    state: NewState
    started: list[Collective]


def lockstep(programs: Sequence[Program]) -> list[Outcome]:
    """Run one program a rank to the end. Fails where ranks yield what does not fit together."""
    outcomes: list[Outcome | None] = [None] * len(programs)
    started: list[list[Collective]] = [[] for _ in programs]

    def resume(rank: int, result: Any) -> None:
        try:
            started[rank].append(programs[rank].send(result))
        except StopIteration as stop:
            mean, new_state = stop.value
            outcomes[rank] = Outcome(mean, new_state, started[rank])

    results: list[Any] = [None] * len(programs)
    while True:
        for rank, result in enumerate(results):
            resume(rank, result)
        done = [outcome for outcome in outcomes if outcome is not None]
        if done:
            assert len(done) == len(programs), "some ranks have come to an end, others have not"
            return done
        results = combine([collectives[-1] for collectives in started])


def combine(collectives: Sequence[Collective]) -> list[Any]:
    """Each rank's result, as a communicator would give it: nothing is shared between ranks but what their own sent."""
    first, count = collectives[0], len(collectives)
    assert all(item.group == "world" for item in collectives), "groups of ranks need real communicators: simulate"
    assert all(type(other) is type(first) for other in collectives), [type(other).__name__ for other in collectives]
    if isinstance(first, AllToAll):
        rows: list[list[torch.Tensor]] = [item.chunks for item in collectives]  # type: ignore[union-attr]
        assert all(len(row) == count for row in rows)
        assert not first.same_size or len({chunk.shape for row in rows for chunk in row}) == 1
        return [list(_copies([row[rank] for row in rows], first.same_size)) for rank in range(count)]

    tensors: list[torch.Tensor] = [item.tensor for item in collectives]  # type: ignore[union-attr]
    assert len({tensor.dtype for tensor in tensors}) == 1
    if isinstance(first, AllGather):
        assert not first.same_size or len({tensor.shape for tensor in tensors}) == 1
        return [list(_copies(tensors, first.same_size)) for _ in range(count)]
    assert len({tensor.shape for tensor in tensors}) == 1
    if isinstance(first, Broadcast):
        root = tensors[first.root].clone()
        return [tensor.copy_(root) for tensor in tensors]
    assert all(item.op == first.op for item in collectives if isinstance(item, AllReduce))
    if count == 1:
        return list(tensors)
    reduced = _reduced(tensors, first)
    return [tensor.copy_(reduced) for tensor in tensors]  # in place, as engines do


def _copies(tensors: Sequence[torch.Tensor], same_size: bool) -> Sequence[torch.Tensor]:
    """As rows of one tensor where sizes allow, like a gathered result; kernels may make use of that."""
    return list(torch.stack(list(tensors))) if same_size else [tensor.clone() for tensor in tensors]


def _reduced(tensors: Sequence[torch.Tensor], collective: AllReduce) -> torch.Tensor:
    """In rank order. Half precision is divided before the sum, which rounds once, as in ``comm.base``."""
    is_half = tensors[0].is_floating_point() and tensors[0].itemsize < 4
    parts = [tensor / len(tensors) for tensor in tensors] if is_half and collective.op == "mean" else list(tensors)
    total = parts[0].float() if is_half else parts[0].clone()
    for part in parts[1:]:
        match collective.op:
            case "min":
                total = torch.minimum(total, part)
            case "max":
                total = torch.maximum(total, part)
            case _:
                total += part
    if collective.op == "mean" and not is_half:
        total /= len(tensors)
    return total.to(tensors[0].dtype)
