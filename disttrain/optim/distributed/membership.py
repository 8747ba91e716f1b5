"""Which parameters a distributed optimizer exchanges, and whether all ranks see them alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from disttrain.comm.base import Communicator
from disttrain.errors import UserError
from disttrain.optim.replicas.synchronization import broadcast_tensors
from disttrain.reduction.bucket import NamedParameter


def check_arguments(optimizer: Optimizer, **limits: float | None) -> None:
    """Raise UserError if the optimizer takes no dense gradients, or one of the ``limits`` is not above 0."""
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UserError("SparseAdam wants sparse gradients, and means are exchanged dense: use Adam")
    for name, limit in limits.items():
        if limit is not None and limit <= 0:
            raise UserError(f"{name} must be above 0; got {limit}")


def named_parameters(optimizer: Optimizer, model: torch.nn.Module) -> tuple[list[NamedParameter], list[NamedParameter]]:
    """The optimizer's parameters by name, in the model's order: those that require a gradient, and the frozen ones.

    Raises:
        UserError: a parameter is not the model's, is complex, or lies on another device than the others.
    """
    wanted = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in wanted:
        if parameter not in names:
            raise UserError(
                f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not the model's: "
                "pass its own model"
            )
        if parameter.is_complex():
            raise UserError(f"parameter {names[parameter]!r} is complex: hold it as torch.view_as_real(...)")
    members = [(name, p) for p, name in names.items() if p in wanted]
    if len(devices := sorted({str(p.device) for _, p in members})) > 1:
        raise UserError(f"parameters lie on several devices, {', '.join(devices)}: a worker trains on one")
    return [member for member in members if member[1].requires_grad], [m for m in members if not m[1].requires_grad]


def check_own(model: torch.nn.Module, names: Mapping[torch.nn.Parameter, str]) -> None:
    """Raise UserError if the model has other parameters by now than those that are trained."""
    present = dict(model.named_parameters())
    for parameter, name in names.items():
        if name in present and present[name] is not parameter:
            raise UserError(
                f"the model's {name!r} is not the parameter that the optimizer has: something has replaced it, such as "
                "load_state_dict(assign=True). Load without assign, or make the optimizers afterwards"
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
        Its parameters by name, as ``named_parameters`` gives them.

    Raises:
        UserError: they are not the model's, or ranks add different ones.
    """
    optimizer.add_param_group(group)
    try:
        both = named_parameters(optimizer, model)
    except UserError:
        optimizer.param_groups.pop()
        raise
    trained, frozen = ([member for member in members if member[1] not in known] for members in both)
    added = [*trained, *frozen]
    check_alike({"the added parameters": [[name, list(parameter.shape)] for name, parameter in added]}, comm)
    broadcast_tensors([parameter for _, parameter in added], comm)
    return trained, frozen


def to_unfreeze(
    parameters: Iterable[torch.nn.Parameter],
    model: torch.nn.Module,
    known: Mapping[torch.nn.Parameter, str],
    comm: Communicator,
) -> list[NamedParameter]:
    """Those of the parameters that are frozen, in the model's order. A collective.

    Raises:
        UserError: one is not the optimizer's, or ranks name different ones.
    """
    wanted = set(parameters)
    if foreign := wanted - known.keys():
        names = {parameter: name for name, parameter in model.named_parameters()}
        raise UserError(
            f"{sorted(names.get(parameter, '?') for parameter in foreign)[0]!r} cannot be unfrozen: give it to the "
            "torch optimizer before that is wrapped"
        )
    thawed = [(name, p) for name, p in model.named_parameters() if p in wanted and not p.requires_grad]
    if len(different := {tuple(names) for names in comm.all_gather_object([name for name, _ in thawed])}) > 1:
        raise UserError(f"ranks unfreeze different parameters: {sorted(different)}; do it alike everywhere")
    return thawed


def check_alike(what: Mapping[str, Any], comm: Communicator) -> None:
    """Raise UserError, naming the first difference, if ranks give different JSON values. A collective."""
    theirs = comm.all_gather_object(what)
    for rank, other in enumerate(theirs):
        for key in what:
            if other.get(key) != theirs[0].get(key):
                raise UserError(
                    f"ranks make the optimizer with different settings: {key} is {_short(theirs[0].get(key))} on "
                    f"rank 0 and {_short(other.get(key))} on rank {rank}; make it alike everywhere"
                )


def describe(optimizer: Optimizer, parameters: Sequence[NamedParameter]) -> dict[str, Any]:
    """What must be alike of a torch optimizer, as JSON values."""
    return {
        "optimizer": type(optimizer).__name__,
        "its parameters": [name for name, _ in parameters],
        "its options": settings_of(optimizer.param_groups),
    }


def settings_of(groups: Sequence[Mapping[str, Any]]) -> str:
    """The numbers and switches of an optimizer's groups, as text."""
    return "; ".join(
        ", ".join(f"{key}={value}" for key, value in group.items() if _is_setting(key, value)) for group in groups
    )


def _is_setting(key: str, value: Any) -> bool:
    kinds = (bool, int, float, str)
    return isinstance(value, kinds) or (
        isinstance(value, tuple | list) and all(isinstance(one, kinds) for one in value)
    )


def check_can_be_unscaled(trained: Iterable[NamedParameter]) -> None:
    """Raise UserError if gradients would vanish where they are divided by a loss scale."""
    for name, parameter in trained:
        if parameter.dtype == torch.float16:
            raise UserError(
                f"parameter {name!r} is float16, in which unscaled gradients would vanish: "
                "keep parameters in float32 and compute under torch.autocast"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
