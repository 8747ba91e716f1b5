"""Checks that replicas are bit-identical, and names the first difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from disttrain.collectives import AllGather
from disttrain.comm.base import Communicator

if TYPE_CHECKING:
    from disttrain.optim.distributed import DistributedOptimizer

_SPREAD = 0x9E3779B97F4A7C15 - 2**64  # odd, so that every tensor's checksum changes the sum


class Difference(NamedTuple):
    """The first tensor that differs between ranks, and the ranks whose copy is not the most common one.

    If two copies are equally common, that of the lowest rank counts as the right one.
    """

    tensor: str
    ranks: list[int]


def replicated_tensors(optimizer: DistributedOptimizer) -> dict[str, torch.Tensor]:
    """Return what must be identical on all ranks: parameters, optimizer state, the compressors' replicated state."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in optimizer.model.named_parameters()}
    tensors = {name: parameter.detach() for parameter, name in names.items()}
    for parameter, state in optimizer.inner.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and parameter in names:
                tensors[f"{names[parameter]}/{key}"] = value
    for bucket in optimizer.reducer.buckets:
        for name, key, view, replicated in bucket.state.slices(bucket.description.names):
            if replicated:
                tensors[f"{name}/{key}"] = view
    return dict(sorted(tensors.items()))


def first_difference(tensors: Mapping[str, torch.Tensor], comm: Communicator) -> Difference | None:
    """Compare tensors by checksum. Return None if they are identical; the same answer on all ranks. A collective.

    This costs a pass over memory, and 8 bytes per rank if there is no difference.
    """
    if comm.world_size == 1 or not tensors:
        return None
    sums = torch.stack([_checksum(tensor).to(comm.control_device) for tensor in tensors.values()])
    places = torch.arange(1, len(sums) + 1, device=sums.device)
    whole = (sums * (places * _SPREAD | 1)).sum().view(1)
    if len({int(one) for one in comm.start(AllGather(whole, same_size=True)).wait()}) == 1:
        return None
    rows = torch.stack(comm.start(AllGather(sums, same_size=True)).wait()).cpu()
    for name, column in zip(tensors, rows.T.tolist(), strict=True):
        counts = Counter(column)
        if len(counts) > 1:
            right = max(counts, key=lambda value: counts[value])  # the lowest rank's of equals
            return Difference(name, [rank for rank, value in enumerate(column) if value != right])
    return None


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of the tensor's 4-byte words as integers, 0-d int64. Every change of a single word changes it."""
    memory = tensor.contiguous().view(-1).view(torch.uint8)
    return memory.view(torch.int32 if memory.numel() % 4 == 0 else torch.uint8).sum(dtype=torch.int64)
