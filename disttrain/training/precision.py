"""The precision of forward and backward, by autocast. Parameters and gradients keep the run's dtype."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
from pydantic import Field

from disttrain.errors import UserError
from disttrain.optim.distributed.loss_scale import LossScale
from disttrain.validation import Section

Precision = Literal["fp32", "bf16", "fp16"]

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LossScaling(Section):
    """How the loss scale of ``precision: fp16`` changes. Factors are powers of two, so scaling does not round."""

    initial: float = Field(default=2.0**16, gt=0, description="initial factor of the loss")
    growth_factor: float = Field(default=2.0, ge=1, description="factor of the scale after growth_interval")
    backoff_factor: float = Field(
        default=0.5, gt=0, le=1, description="factor of the scale after an overflow; that step is skipped"
    )
    growth_interval: int = Field(default=2000, ge=1, description="consecutive finite steps after which the scale grows")
    minimum: float = Field(default=1.0, ge=1, description="smallest scale")

    def build(self) -> LossScale:
        """Return the initial loss scale.

        Raises:
            UserError: a number is not a power of two, or the minimum is above the initial scale.
        """
        return LossScale(
            self.initial,
            growth_factor=self.growth_factor,
            backoff_factor=self.backoff_factor,
            growth_interval=self.growth_interval,
            minimum=self.minimum,
        )


def check_precision(precision: Precision, dtype: str) -> None:
    """Raise UserError if autocast would not change the run's dtype."""
    if precision != "fp32" and dtype != "float32":
        raise UserError(f"precision={precision!r} is for models in float32, and dtype={dtype}: set dtype=float32")


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context manager in which forward passes compute in ``precision``."""
    half = _HALVES.get(precision)
    return contextlib.nullcontext() if half is None else torch.autocast(device.type, half)
