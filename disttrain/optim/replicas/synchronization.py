"""Checking, broadcasting and averaging models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch.nn.parameter import is_lazy

from disttrain.collectives import AllReduce, Broadcast
from disttrain.comm.base import Communicator
from disttrain.comm.coalescing import run_coalesced
from disttrain.errors import UserError


def check_has_values(model: torch.nn.Module) -> None:
    """Raise UserError, naming the first one, if parameters or buffers have no values yet.

    Lazy modules, such as ``nn.LazyLinear``, get shapes and values in the first forward pass.
    """
    if problem := _without_values(model):
        raise UserError(problem)


def check_same_model(model: torch.nn.Module, comm: Communicator) -> None:
    """Raise UserError, naming the first difference, if names, shapes or dtypes differ between ranks.

    All ranks also raise it if parameters or buffers have no values yet on any rank. A collective.
    """
    if problem := next(filter(None, comm.all_gather_object(_without_values(model))), ""):
        raise UserError(problem)
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
                f"the model differs between ranks: rank 0 has {here}, rank {odd} has {there}; build it the same on all"
            )


def _without_values(model: torch.nn.Module) -> str:
    """Return what to do about the first parameter or buffer without values; empty if there is none."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            return f"{name!r} is of a lazy module and has no shape yet: run one forward pass on a batch before training"
        if tensor.is_meta:
            return f"{name!r} is on the meta device and has no values: call model.to_empty and set them before training"
    return ""


def broadcast_model(model: torch.nn.Module, comm: Communicator) -> None:
    """Copy rank 0's parameters and buffers to all ranks. A collective."""
    broadcast_tensors([*model.parameters(), *model.buffers()], comm)


def broadcast_tensors(tensors: Iterable[torch.Tensor], comm: Communicator) -> None:
    """Copy rank 0's values to all ranks. A collective."""
    run_coalesced(tensors, comm, Broadcast)


def average_buffers(model: torch.nn.Module, comm: Communicator) -> None:
    """Average floating-point and complex buffers over ranks, copy others (counters, masks) from rank 0."""
    buffers = list(model.buffers())
    average_tensors((buffer for buffer in buffers if _has_mean(buffer)), comm)
    run_coalesced([buffer for buffer in buffers if not _has_mean(buffer)], comm, Broadcast)


def average_tensors(tensors: Iterable[torch.Tensor], comm: Communicator) -> None:
    """Replace floating-point and complex tensors by their means over ranks. A collective."""
    run_coalesced(map(_as_real, tensors), comm, lambda flat: AllReduce(flat, "mean"))


def _has_mean(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _as_real(tensor: torch.Tensor) -> torch.Tensor:
    """View a complex tensor as pairs of real and imaginary parts, whose means are those of the tensor."""
    if not tensor.is_complex():
        return tensor
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)
