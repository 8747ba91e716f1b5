"""Half precision: the gradient travels as float16 or bfloat16 (as in Horovod's and DDP's fp16 hooks)."""

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

    Nearly linear: ranks divide by their number before the sum, which is rounded too. A residual holds what the own cast
    rounded off, not the roundings of the sum.
    """

    half: ClassVar[torch.dtype]
    # Half of dense's bytes are still what the wire is busy with: small buckets start sooner and hide behind backward.
    bucket_mb: ClassVar[float] = 8.0

    min_numel: int = Field(default=0, ge=0, description="parameters of fewer elements travel dense")
    error_feedback: bool = Field(default=False, description="add what the cast rounded off to the next gradient")

    def accepts(self, shape: Sequence[int]) -> bool:
        return math.prod(shape) >= self.min_numel

    def init_state(self, bucket: Bucket) -> State:
        state = State()
        if self.error_feedback:
            state.add_zeros("residual", bucket)
        return state

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        kept = {}
        if self.error_feedback:
            rest = torch.add(grad, state.residual, out=state.scratch("residual"))
            sent = self._cast(grad.copy_(rest), bucket.world_size)
            kept["residual"] = rest.sub_(sent)
        else:
            sent = self._cast(grad, bucket.world_size)
        # The all-reduce owns ``sent``: nothing below may read it again.
        mean = yield AllReduce(sent, op="mean")
        return grad.copy_(mean), kept

    def _cast(self, values: torch.Tensor, world_size: int) -> torch.Tensor:
        """``values`` in half precision; may overwrite them."""
        return values.to(self.half)


class Float16(Cast):
    """Cast to IEEE half precision: 11 bits of fraction, from 6e-8 to 65504. What is larger is sent as the largest.

    Differs from the usual hooks, which cast first and then meet infinities: gradients are clamped before the cast, so
    far below the end of the range that the roundings of a sum over all ranks cannot reach it.
    """

    name = "fp16"
    half: ClassVar[torch.dtype] = torch.float16

    def _cast(self, values: torch.Tensor, world_size: int) -> torch.Tensor:
        info = torch.finfo(self.half)
        bound = info.max / (1 + world_size * info.eps)
        return values.clamp_(-bound, bound).to(self.half)


class BFloat16(Cast):
    """Cast to bfloat16: 8 bits of fraction, the range of float32 (a float64 beyond that becomes infinite)."""

    name = "bf16"
    half: ClassVar[torch.dtype] = torch.bfloat16
