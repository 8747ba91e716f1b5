"""A dynamic loss scale: it keeps float16 gradients from underflowing, and decreases after an overflow."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from disttrain.errors import UserError

logger = logging.getLogger(__name__)


class LossScale:
    """A factor of the loss before backward, so that gradients in float16 do not underflow.

    Give it to the ``DistributedOptimizer``, which divides every gradient by it before a compressor sees it, skips the
    step on all ranks if some gradient overflowed, and calls ``update``. Residuals, clipping and
    ``parameter.grad`` after ``backward`` are in true units::

        loss_scale = disttrain.LossScale()
        optimizer = disttrain.DistributedOptimizer(inner, model, comm=comm, loss_scale=loss_scale)
        with torch.autocast(comm.device.type, torch.float16):
            loss = loss_fn(model(x), y)
        loss_scale.scale(loss).backward()
        optimizer.step()

    All numbers are powers of two, so that scaling does not round (Micikevicius et al. 2018, arXiv:1710.03740).

    Args:
        initial: the scale of the first step.
        growth_factor: multiplies the scale after ``growth_interval`` finite steps in a row.
        backoff_factor: multiplies the scale after an overflow.
        growth_interval: number of optimizer steps.
        minimum: smallest scale.

    Attributes:
        value: the current scale.
        sound_steps: number of finite steps in a row since the scale last changed.
        is_exhausted: whether the last step overflowed with the scale at its minimum.

    Raises:
        UserError: a number is not a power of two, or the bounds contradict each other.
    """

    def __init__(
        self,
        initial: float = 2.0**16,
        *,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        minimum: float = 1.0,
    ) -> None:
        numbers = {"initial": initial, "growth_factor": growth_factor, "backoff_factor": backoff_factor}
        for name, number in {**numbers, "minimum": minimum}.items():
            if not number > 0 or not math.isfinite(number) or math.frexp(number)[0] != 0.5:
                raise UserError(f"loss_scale.{name}={number!r} must be a power of two, so that scaling does not round")
        if growth_factor < 1:
            raise UserError(f"loss_scale.growth_factor={growth_factor!r} must be 1 or more")
        if backoff_factor > 1:
            raise UserError(f"loss_scale.backoff_factor={backoff_factor!r} must be 1 or less")
        if growth_interval < 1:
            raise UserError(f"loss_scale.growth_interval={growth_interval!r} must be 1 or more")
        if not 1 <= minimum <= initial:
            raise UserError(f"loss_scale.minimum={minimum!r} must be at least 1 and at most initial={initial!r}")
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.minimum = minimum
        self.value = float(initial)
        self.sound_steps = 0
        self.is_exhausted = False

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss times the scale, in float32 at least, since it might overflow in float16."""
        return loss.to(torch.promote_types(loss.dtype, torch.float32)) * self.value

    def update(self, is_finite: bool) -> None:
        """Decrease the scale after an overflow, increase it after enough finite steps. The same on all ranks."""
        self.sound_steps = self.sound_steps + 1 if is_finite else 0
        self.is_exhausted = not is_finite and self.value == self.minimum
        if not is_finite:
            if self.is_exhausted:
                logger.warning("the loss scale is at its minimum of %g and a gradient was inf or NaN", self.minimum)
            self.value = max(self.minimum, self.value * self.backoff_factor)
        elif self.sound_steps == self.growth_interval:
            self.sound_steps = 0
            grown = self.value * self.growth_factor
            if math.isfinite(torch.tensor(grown, dtype=torch.float32).item()):
                self.value = grown

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"value", "sound_steps"}``, which JSON can hold."""
        return {"value": self.value, "sound_steps": self.sound_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        self.value, self.sound_steps = float(state_dict["value"]), int(state_dict["sound_steps"])
