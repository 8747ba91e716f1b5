"""What the constructor of a distributed optimizer checks, shares and connects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from disttrain.comm.base import Communicator
from disttrain.compression import Policy
from disttrain.errors import UserError
from disttrain.optim.distributed.loss_scale import LossScale
from disttrain.optim.distributed.parameters import (
    check_can_be_unscaled,
    check_same,
    describe,
    named_parameters,
    settings_of,
)
from disttrain.optim.replicas.synchronization import broadcast_model, check_same_model
from disttrain.reduction import Reducer


def check_arguments(
    optimizer: Optimizer,
    loss_scale: LossScale | None,
    grad_scaler: torch.amp.GradScaler | None,
    limits: Mapping[str, float | None],
) -> None:
    """Raise UserError if arguments contradict each other or one of the ``limits`` is not above 0."""
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UserError("SparseAdam takes sparse gradients only, and mean gradients are dense: use Adam")
    for name, limit in limits.items():
        if limit is not None and limit <= 0:
            raise UserError(f"{name} must be above 0; got {limit}")
    if loss_scale is not None and grad_scaler is not None:
        raise UserError("give either a loss_scale or a grad_scaler: each scales the losses by itself")


def build_reducer(
    optimizer: Optimizer,
    model: torch.nn.Module,
    comm: Communicator,
    policy: Policy,
    *,
    bucket_mb: float | None,
    overlap_step: bool,
    loss_scale: LossScale | None,
    settings: Mapping[str, Any],
) -> tuple[Reducer, dict[torch.nn.Parameter, str]]:
    """Check that all ranks have the same model and settings, copy rank 0's model to all, and make the reducer.

    A collective.

    Args:
        optimizer: the torch optimizer.
        model: whose parameters the optimizer has.
        comm: the ranks.
        policy: chooses the compressor of each parameter.
        bucket_mb: see ``DistributedOptimizer``.
        overlap_step: see ``DistributedOptimizer``.
        loss_scale: see ``DistributedOptimizer``.
        settings: further arguments that must be the same on all ranks, as JSON values.

    Returns:
        The reducer, and the names of the optimizer's parameters.

    Raises:
        UserError: see ``DistributedOptimizer``.
    """
    check_same_model(model, comm)  # first, since it raises on all ranks what may be wrong on one
    trained, frozen = named_parameters(optimizer, model)
    if not trained:
        raise UserError("the optimizer has no parameter that requires a gradient: nothing to train")
    if loss_scale is not None:
        check_can_be_unscaled(trained)
    named = (*trained, *frozen)
    options = {"overlap_step": overlap_step, "bucket_mb": bucket_mb}
    check_same({**describe(optimizer, named), "compressor": policy.to_dict(), **options, **settings}, comm)
    broadcast_model(model, comm)
    description = f"{type(optimizer).__name__} over {trained[0][0]}, ... ({len(trained)} parameters)"
    reducer = Reducer(
        trained, comm, policy, bucket_mb, frozen=frozen, overlap_step=overlap_step, description=description
    )
    return reducer, {parameter: name for name, parameter in named}


def connect(
    reducer: Reducer, optimizer: Optimizer, loss_scale: LossScale | None, grad_scaler: torch.amp.GradScaler | None
) -> None:
    """Let the reducer ask for the optimizer's settings and for the loss scale."""
    reducer.settings = lambda: settings_of(optimizer.param_groups)
    if loss_scale is not None:
        reducer.loss_scale = lambda: loss_scale.value
    if grad_scaler is not None:
        reducer.loss_scale, reducer.rescales = grad_scaler.get_scale, True
