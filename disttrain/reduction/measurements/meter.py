"""What measures gradients in some steps, before and after their exchange."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from disttrain.reduction.buckets.bucket import GradientBucket
from disttrain.reduction.measurements.ledger import Account

STATISTICS = Account("statistics")
"""Where the bytes of measurements are counted."""


class Meter(Protocol):
    """A measurement of some steps. The reducer calls ``is_due`` once a step.

    The other methods are called only in steps that are due. ``is_due`` must be the same on all ranks, and collectives
    must start in the same order.
    """

    def is_due(self, step: int, buckets: Sequence[GradientBucket]) -> bool:
        """Whether to measure the step after ``step`` steps that were taken."""

    def before_exchange(self, bucket: GradientBucket, flat: torch.Tensor) -> None:
        """Look at this rank's own gradient, in true units; a compressor may overwrite it afterwards."""

    def after_exchange(self, bucket: GradientBucket, mean: torch.Tensor) -> None:
        """Look at the mean of a finite exchange, before the reducer loads it and the bucket's new state."""

    def result(self, is_complete: bool) -> Any:
        """Return the result, after all buckets have arrived.

        Args:
            is_complete: False if gradients were not finite or some came late.
        """
