"""Keeping the ranks' copies of a model alike: check, broadcast, average."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch

from disttrain.collectives import AllReduce, Broadcast
from disttrain.comm.base import Communicator
from disttrain.errors import UserError

_CHUNK_BYTES = 64 * 2**20  # tensors are joined up to this size, so that a model is a few messages


def check_same_model(model: torch.nn.Module, comm: Communicator) -> None:
    """Raise UserError, naming the first difference, if names, shapes or dtypes differ between ranks."""
    mine = [
        f"{name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{'' if needs_grad else ' frozen'}"
        for name, tensor, needs_grad in (
            *((name, p, p.requires_grad) for name, p in model.named_parameters()),
            *((name, b, True) for name, b in model.named_buffers()),
        )
    ]
    digest = hashlib.sha256(json.dumps(mine).encode()).hexdigest()
    digests = comm.all_gather_object(digest)
    odd = next((rank for rank, other in enumerate(digests) if other != digests[0]), None)
    if odd is None:
        return
    models = comm.all_gather_object(mine)
    reference, other = models[0], models[odd]
    for index in range(max(len(reference), len(other))):
        here = reference[index] if index < len(reference) else "nothing"
        there = other[index] if index < len(other) else "nothing"
        if here != there:
            raise UserError(
                f"the model differs between ranks: rank 0 has {here}, rank {odd} has {there}; build it alike everywhere"
            )


def broadcast_model(model: torch.nn.Module, comm: Communicator) -> None:
    """Copy rank 0's parameters and buffers to all ranks."""
    _broadcast([*model.parameters(), *model.buffers()], comm)


def average_buffers(model: torch.nn.Module, comm: Communicator) -> None:
    """Average floating-point buffers over ranks; copy the others (counters, masks) from rank 0."""
    buffers = list(model.buffers())
    average_tensors((buffer for buffer in buffers if buffer.is_floating_point()), comm)
    _broadcast([buffer for buffer in buffers if not buffer.is_floating_point()], comm)


def average_tensors(tensors: Iterable[torch.Tensor], comm: Communicator) -> None:
    """Replace floating-point tensors by their means over ranks."""
    for chunk in _chunks(tensors):
        _scatter(comm.start(AllReduce(_join(chunk), "mean")).wait(), chunk)


def _broadcast(tensors: Iterable[torch.Tensor], comm: Communicator) -> None:
    for chunk in _chunks(tensors):
        _scatter(comm.start(Broadcast(_join(chunk))).wait(), chunk)


def _chunks(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Lists of tensors of one dtype and device, of limited size, in an order that is alike on all ranks."""
    chunks: defaultdict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = defaultdict(list)
    for tensor in tensors:
        chunk = chunks[tensor.dtype, tensor.device]
        chunk.append(tensor)
        if sum(member.nbytes for member in chunk) >= _CHUNK_BYTES:
            yield chunk
            del chunks[tensor.dtype, tensor.device]
    yield from chunks.values()


def _join(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@torch.no_grad()
def _scatter(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))
