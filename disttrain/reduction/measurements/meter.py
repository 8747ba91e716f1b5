"""What looks at gradients in some steps: before they are compressed, and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from disttrain.reduction.bucket import GradientBucket
from disttrain.reduction.measurements.ledger import Account

STATISTICS = Account("statistics")
"""Whose the bytes of measurements are."""


class Meter(Protocol):
    """The reducer asks at a step's first bucket whether it is due; the other calls come only in a step in which it is.

    All ranks must find it due alike, and start its collectives in one order.
    """

    def is_due(self, step: int, buckets: Sequence[GradientBucket]) -> bool:
        """Whether to measure the step after ``step`` committed ones."""

    def leave(self, bucket: GradientBucket, flat: torch.Tensor) -> None:
        """Look at this rank's own gradient, in true units, as it is sent; a compressor may overwrite it afterwards."""

    def land(self, bucket: GradientBucket, mean: torch.Tensor) -> None:
        """Look at the mean that has arrived, of a sound step, before it and the bucket's new state are committed."""

    def finish(self, is_whole: bool) -> Any:
        """The result, after all is committed. ``is_whole`` is False where the step was skipped or sent in parts."""
