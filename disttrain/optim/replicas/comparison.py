"""Whether the ranks' replicas are alike to the bit, and if not, where they part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from disttrain.collectives import AllGather
from disttrain.comm.base import Communicator

if TYPE_CHECKING:
    from disttrain.optim.distributed import DistributedOptimizer

_SPREAD = 0x9E3779B97F4A7C15 - 2**64  # odd, so that no tensor's checksum is lost in the sum over all


class Difference(NamedTuple):
    """The first tensor that is not alike on all ranks, and the ranks whose copy is not the most common one.

    Where two copies are equally common, rank 0's is taken for right.
    """

    tensor: str
    ranks: list[int]


def replicated_tensors(optimizer: DistributedOptimizer) -> dict[str, torch.Tensor]:
    """What must be alike on all ranks: parameters, the optimizer's state, the compressor's replicated state."""
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
    """Compare tensors of equal names and sizes by checksum: a pass over memory, and 8 bytes a rank if all is well.

    None if they are alike on all ranks; the same answer on all of them.
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
            right = max(counts, key=lambda value: counts[value])  # the first of equals: rank 0's, or the lowest rank's
            return Difference(name, [rank for rank, value in enumerate(column) if value != right])
    return None


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of its memory's 4-byte words as integers, 0-d int64: no change of a single word leaves it as it was."""
    memory = tensor.contiguous().view(-1).view(torch.uint8)
    return memory.view(torch.int32 if memory.numel() % 4 == 0 else torch.uint8).sum(dtype=torch.int64)
