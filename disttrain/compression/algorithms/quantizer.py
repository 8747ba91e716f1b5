"""The base of codecs that send a few bits an entry and one scale a block."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from disttrain.compression.base import Bucket, State
from disttrain.compression.codec import FusedCodec, Payload
from disttrain.kernels import Feedback, for_device


class Quantizer(FusedCodec):
    """Integer codes times max|x| / L, with L = 2^(bits-1) - 1 levels on either side, in blocks that share a scale.

    Wire: bits/8 bytes an entry, and the size of a value a block.
    """

    # Payloads are still large. Smaller buckets start earlier, so that more of the exchange overlaps with backward.
    bucket_mb: ClassVar[float] = 10.0
    rounds_at_random: ClassVar[bool] = False

    block_size: int = Field(default=512, ge=16, multiple_of=16, description="entries that share one scale")
    seed: int = Field(default=0, description="of the private random generators")

    @property
    @abstractmethod
    def width(self) -> int:
        """Bits of a code."""

    def converts_units(self) -> bool:
        return self.error_feedback

    def encode_with_residual(
        self, grad: torch.Tensor, feedback: Feedback | None, bucket: Bucket, state: State
    ) -> Payload:
        # Ranks must round independently, so that their errors average out.
        seed = bucket.seed(self.seed, state.step, per_rank=True) if self.rounds_at_random else None
        kernels = for_device(grad.device)
        codes, scales = kernels.quantize(grad, feedback, self.width, self.block_size, seed)
        return {"scales": scales, "codes": codes}

    def decode_mean(
        self,
        payloads: Sequence[Payload],
        out: torch.Tensor,
        bucket: Bucket,
        *,
        add: bool = False,
        factors: torch.Tensor | None = None,
    ) -> None:
        codes, scales = ([payload[key] for payload in payloads] for key in ("codes", "scales"))
        kernels = for_device(out.device)
        kernels.dequantize_mean(codes, scales, self.width, self.block_size, out, add=add, factors=factors)

    def decode_mean_times(
        self, factors: torch.Tensor | None, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket
    ) -> None:
        self.decode_mean(payloads, out, bucket, factors=factors)
