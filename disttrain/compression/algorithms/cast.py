"""Half precision: send the gradient as float16 or bfloat16 (as in Horovod's and DDP's fp16 hooks)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from disttrain.collectives import AllReduce
from disttrain.compression.base import Bucket, Compressor, Program, State


class Cast(Compressor):
    """Cast, all-reduce, cast back. Wire: 2 bytes an entry.

    Nearly linear: ranks divide by the world size before the sum, which is rounded as well. The residual holds the
    rounding errors of this rank's cast, not those of the sum.
    """

    half: ClassVar[torch.dtype]
    # Payloads are half as large as dense ones. Small buckets start earlier, and so overlap with backward.
    bucket_mb: ClassVar[float] = 8.0

    min_numel: int = Field(default=0, ge=0, description="parameters of fewer elements are sent dense")
    error_feedback: bool = Field(default=False, description="add what the cast rounded off to the next gradient")

    def accepts(self, shape: Sequence[int]) -> bool:
        return math.prod(shape) >= self.min_numel

    def init_state(self, bucket: Bucket) -> State:
        state = State()
        if self.error_feedback:
            state.add_zeros("residual", bucket)
        return state

    def num_rounds(self, bucket: Bucket) -> int:
        return 1

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        new_state = {}
        if self.error_feedback:
            total = torch.add(grad, state.residual, out=state.scratch("residual"))
            sent = self._cast(grad.copy_(total), bucket.world_size)
            new_state["residual"] = total.sub_(sent)
        else:
            sent = self._cast(grad, bucket.world_size)
        # The all-reduce may overwrite ``sent``, so nothing below reads it again.
        mean = yield AllReduce(sent, op="mean")
        return grad.copy_(mean), new_state

    def _cast(self, values: torch.Tensor, world_size: int) -> torch.Tensor:
        """Convert to half precision; may overwrite ``values``."""
        return values.to(self.half)


class Float16(Cast):
    """Cast to IEEE half precision: 11 bits of significand, from 6e-8 to 65504. Larger numbers are clamped.

    Differs from the usual hooks, whose casts overflow to infinity: gradients are clamped before the cast, far enough
    below the end of the range that a rounded sum over all ranks cannot reach it.
    """

    name = "fp16"
    half: ClassVar[torch.dtype] = torch.float16

    def _cast(self, values: torch.Tensor, world_size: int) -> torch.Tensor:
        info = torch.finfo(self.half)
        bound = info.max / (1 + world_size * info.eps)
        return values.clamp_(-bound, bound).to(self.half)


class BFloat16(Cast):
    """Cast to bfloat16: 8 bits of significand, the range of float32 (a larger float64 becomes infinite)."""

    name = "bf16"
    half: ClassVar[torch.dtype] = torch.bfloat16
