"""The numbers that forward and backward compute in, by autocast; parameters and gradients keep the run's dtype."""

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
    """How the loss scale of ``precision: fp16`` moves. Factors are powers of two, so that scaling rounds nothing."""

    initial: float = Field(default=2.0**16, gt=0, description="what the loss is multiplied by at first")
    growth_factor: float = Field(default=2.0, ge=1)
    backoff_factor: float = Field(
        default=0.5, gt=0, le=1, description="after a step with an overflow, which is skipped"
    )
    growth_interval: int = Field(default=2000, ge=1, description="sound steps in a row after which the scale grows")
    minimum: float = Field(default=1.0, ge=1)

    def build(self) -> LossScale:
        """The scale at its beginning.

        Raises:
            UserError: a number is no power of two, or the minimum is above the initial scale.
        """
        return LossScale(
            self.initial,
            growth_factor=self.growth_factor,
            backoff_factor=self.backoff_factor,
            growth_interval=self.growth_interval,
            minimum=self.minimum,
        )


def check_precision(precision: Precision, dtype: str) -> None:
    """Raise UserError if the run's dtype is one that autocast leaves alone."""
    if precision != "fp32" and dtype != "float32":
        raise UserError(f"precision={precision!r} computes float32 models in half precision: set dtype=float32")


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within it, forward passes compute in ``precision``. Nothing for fp32."""
    half = _HALVES.get(precision)
    return contextlib.nullcontext() if half is None else torch.autocast(device.type, half)
