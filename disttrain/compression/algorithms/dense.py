"""No compression: the mean by one all-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from disttrain.collectives import AllReduce
from disttrain.compression.base import Bucket, Compressor, Program, State


class Dense(Compressor):
    """Send gradients as they are, in their own dtype."""

    name = "dense"
    # Uncompressed gradients take long to send. Small buckets start earlier, and so overlap with backward.
    bucket_mb: ClassVar[float] = 8.0
    is_lossless: ClassVar[bool] = True
    sends_gradient_only: ClassVar[bool] = True
    needs_float32: ClassVar[bool] = False

    def accepts(self, shape: Sequence[int]) -> bool:
        return True

    def num_rounds(self, bucket: Bucket) -> int:
        return 1

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        mean = yield AllReduce(grad, op="mean")
        return mean, {}
