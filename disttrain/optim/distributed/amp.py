"""Support for torch.amp.GradScaler."""

from __future__ import annotations

import torch

from disttrain.errors import UserError
from disttrain.reduction import Reducer


def check_can_be_scaled_by_torch(reducer: Reducer, grad_scaler: torch.amp.GradScaler | None) -> None:
    """Raise UserError if a ``GradScaler`` cannot unscale the gradients, or residuals would be in scaled units."""
    if reducer.overlap_step and reducer.has_sent:
        raise UserError("with overlap_step, call optimizer.synchronize() before scaler.unscale_ and scaler.step")
    if grad_scaler is None and reducer.registry.keeps_residuals:
        raise UserError(
            "the compressor keeps a residual, which has to be in true units while the loss scale changes: make the "
            "DistributedOptimizer with grad_scaler=scaler"
        )
