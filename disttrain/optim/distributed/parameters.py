"""The parameters of a distributed optimizer, and checks that they are the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from disttrain.comm.base import Communicator
from disttrain.errors import UserError
from disttrain.optim.replicas.synchronization import broadcast_tensors
from disttrain.reduction.buckets.bucket import NamedParameter


def named_parameters(optimizer: Optimizer, model: torch.nn.Module) -> tuple[list[NamedParameter], list[NamedParameter]]:
    """Return the optimizer's named parameters in the model's order: those that require a gradient, and the frozen ones.

    Raises:
        UserError: a parameter is not the model's, is complex, or is on another device than the others.
    """
    wanted = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in wanted:
        if parameter not in names:
            raise UserError(
                f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not the model's: "
                "pass the optimizer's own model"
            )
        if parameter.is_complex():
            raise UserError(
                f"parameter {names[parameter]!r} is complex: make it a parameter of torch.view_as_real(...)"
            )
    found = [(name, parameter) for parameter, name in names.items() if parameter in wanted]
    if len(devices := sorted({str(parameter.device) for _, parameter in found})) > 1:
        raise UserError(f"parameters are on several devices, {', '.join(devices)}: a worker trains on one")
    return [named for named in found if named[1].requires_grad], [
        named for named in found if not named[1].requires_grad
    ]


def check_not_replaced(model: torch.nn.Module, names: Mapping[torch.nn.Parameter, str]) -> None:
    """Raise UserError if a parameter of the model was replaced after the optimizer was made."""
    current = dict(model.named_parameters())
    for parameter, name in names.items():
        if name in current and current[name] is not parameter:
            raise UserError(
                f"the model's {name!r} is not the parameter that the optimizer has: it was replaced, for instance "
                "by load_state_dict(assign=True). Load without assign, or make the optimizers afterwards"
            )


def add_group(
    optimizer: Optimizer,
    model: torch.nn.Module,
    group: dict[str, Any],
    known: Mapping[torch.nn.Parameter, str],
    comm: Communicator,
) -> tuple[list[NamedParameter], list[NamedParameter]]:
    """Add a group to a torch optimizer, with rank 0's values on all ranks. A collective.

    Returns:
        Its new parameters, as ``named_parameters`` returns them.

    Raises:
        UserError: they are not the model's, or ranks add different ones.
    """
    optimizer.add_param_group(group)
    try:
        both = named_parameters(optimizer, model)
    except UserError:
        optimizer.param_groups.pop()
        raise
    trained, frozen = ([named for named in parameters if named[1] not in known] for parameters in both)
    added = [*trained, *frozen]
    check_same({"the added parameters": [[name, list(parameter.shape)] for name, parameter in added]}, comm)
    broadcast_tensors([parameter for _, parameter in added], comm)
    return trained, frozen


def find_frozen(
    parameters: Iterable[torch.nn.Parameter],
    model: torch.nn.Module,
    known: Mapping[torch.nn.Parameter, str],
    comm: Communicator,
) -> list[NamedParameter]:
    """Return those of the parameters that are frozen, in the model's order. A collective.

    Raises:
        UserError: one is not the optimizer's, or ranks name different ones.
    """
    wanted = set(parameters)
    if foreign := wanted - known.keys():
        names = {parameter: name for name, parameter in model.named_parameters()}
        raise UserError(
            f"{sorted(names.get(parameter, '?') for parameter in foreign)[0]!r} cannot be unfrozen: give it to the "
            "torch optimizer before making the DistributedOptimizer"
        )
    frozen = [(name, p) for name, p in model.named_parameters() if p in wanted and not p.requires_grad]
    if len(different := {tuple(names) for names in comm.all_gather_object([name for name, _ in frozen])}) > 1:
        raise UserError(f"ranks unfreeze different parameters: {sorted(different)}; unfreeze the same on all ranks")
    return frozen


def check_same(settings: Mapping[str, Any], comm: Communicator) -> None:
    """Raise UserError, naming the first difference, if ranks give different JSON values. A collective."""
    by_rank = comm.all_gather_object(settings)
    for rank, other in enumerate(by_rank):
        for key in settings:
            if other.get(key) != by_rank[0].get(key):
                raise UserError(
                    f"ranks make the optimizer with different settings: {key} is {_shorten(by_rank[0].get(key))} on "
                    f"rank 0 and {_shorten(other.get(key))} on rank {rank}; use the same on all ranks"
                )


def describe(optimizer: Optimizer, parameters: Sequence[NamedParameter]) -> dict[str, Any]:
    """Return what must be the same on all ranks about a torch optimizer, as JSON values."""
    return {
        "optimizer": type(optimizer).__name__,
        "its parameters": [name for name, _ in parameters],
        "its options": settings_of(optimizer.param_groups),
    }


def settings_of(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return the numbers and switches of an optimizer's groups, as text."""
    return "; ".join(
        ", ".join(f"{key}={value}" for key, value in group.items() if _is_setting(key, value)) for group in groups
    )


def _is_setting(key: str, value: Any) -> bool:
    kinds = (bool, int, float, str)
    return isinstance(value, kinds) or (
        isinstance(value, tuple | list) and all(isinstance(one, kinds) for one in value)
    )


def check_can_be_unscaled(trained: Iterable[NamedParameter]) -> None:
    """Raise UserError if gradients would underflow when they are divided by a loss scale."""
    for name, parameter in trained:
        if parameter.dtype == torch.float16:
            raise UserError(
                f"parameter {name!r} is float16, in which unscaled gradients would underflow: "
                "keep parameters in float32 and compute under torch.autocast"
            )


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
