"""Run a collective on many tensors as a few large collectives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch

from disttrain.collectives import AllReduce, Broadcast
from disttrain.comm.base import Communicator

_CHUNK_BYTES = 64 * 2**20  # tensors are concatenated up to about this size


def run_coalesced(
    tensors: Iterable[torch.Tensor], comm: Communicator, collective: Callable[[torch.Tensor], AllReduce | Broadcast]
) -> None:
    """Run a collective on every tensor, in place.

    Args:
        tensors: have the same sizes and dtypes on all ranks, in the same order.
        comm: runs the collectives.
        collective: makes a collective of a flat tensor: ``Broadcast``, or ``lambda flat: AllReduce(flat, "mean")``.
    """
    for chunk in _chunks(tensors):
        _unflatten(comm.start(collective(_flatten(chunk))).wait(), chunk)


def _chunks(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Split the tensors into lists of one dtype and device and of limited size; the same lists on all ranks."""
    chunks: defaultdict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = defaultdict(list)
    sizes: defaultdict[tuple[torch.dtype, torch.device], int] = defaultdict(int)
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        chunks[kind].append(tensor)
        sizes[kind] += tensor.nbytes
        if sizes[kind] >= _CHUNK_BYTES:
            yield chunks.pop(kind)
            del sizes[kind]
    yield from chunks.values()


def _flatten(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@torch.no_grad()
def _unflatten(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))
