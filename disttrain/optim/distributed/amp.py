"""torch.amp.GradScaler around a distributed optimizer."""

from __future__ import annotations

import torch

from disttrain.errors import UserError
from disttrain.reduction import Reducer


def check_can_be_scaled_by_torch(reducer: Reducer, grad_scaler: torch.amp.GradScaler | None) -> None:
    """Raise UserError if a ``GradScaler`` cannot unscale the gradients, or residuals would be in scaled units."""
    if reducer.overlap_step and reducer.has_sent:
        raise UserError("with overlap_step, call optimizer.synchronize() before scaler.unscale_ and scaler.step")
    if grad_scaler is None and reducer.members.keep_residuals:
        raise UserError(
            "the compressor keeps a residual, which has to be in true units whatever the loss scale is: make the "
            "optimizer with grad_scaler=scaler"
        )
