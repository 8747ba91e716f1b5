"""Copying one rank's weights and optimizer state to all, after ranks have taken different numbers of steps."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from disttrain.collectives import Broadcast
from disttrain.comm.base import Communicator
from disttrain.comm.coalescing import run_coalesced


@torch.no_grad()
def share(model: torch.nn.Module, optimizer: Optimizer, comm: Communicator, root: int) -> None:
    """Copy rank ``root``'s parameters, optimizer state and group settings to all ranks. A collective.

    Buffers are not copied: they are statistics of each rank's own samples.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    described = comm.broadcast_object([_describe(optimizer.state.get(p, {})) for p in parameters], root)
    tensors: list[torch.Tensor] = list(model.parameters())
    for parameter, entries in zip(parameters, described, strict=True):
        state = optimizer.state[parameter] if entries else optimizer.state.get(parameter, {})
        for name in [name for name in state if name not in entries]:
            del state[name]
        for name, (kind, value, shape) in entries.items():
            if kind == "value":
                state[name] = value
                continue
            current = state.get(name)
            if not isinstance(current, torch.Tensor) or list(current.shape) != shape:
                dtype = getattr(torch, value.removeprefix("torch."))
                is_like = list(parameter.shape) == shape  # a momentum; a number of steps is on the CPU
                state[name] = torch.zeros_like(parameter, dtype=dtype) if is_like else torch.zeros(shape, dtype=dtype)
            tensors.append(state[name])
    run_coalesced(tensors, comm, lambda flat: Broadcast(flat, root))
    settings = comm.broadcast_object([_settings(group) for group in optimizer.param_groups], root)
    for group, theirs in zip(optimizer.param_groups, settings, strict=True):
        group.update({name: value for name, value in theirs.items() if group.get(name) != value})


def _describe(state: dict[str, Any]) -> dict[str, list[Any]]:
    """Return ``["tensor", dtype, shape]`` or ``["value", value, None]`` by name."""
    entries: dict[str, list[Any]] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            entries[name] = ["tensor", str(value.dtype), list(value.shape)]
        elif value is None or isinstance(value, bool | int | float | str):
            entries[name] = ["value", value, None]
    return entries


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if isinstance(value, bool | int | float)}
