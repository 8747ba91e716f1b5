"""EF-signSGD: one bit an entry, or two, with error feedback (Karimireddy et al. 2019, arXiv:1901.09847)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from disttrain.compression.base import Bucket, State
from disttrain.compression.codec import FusedCodec, Payload
from disttrain.kernels import Feedback, for_device


class EFSign(FusedCodec):
    """Send the signs, and one scale a block: C(x) = (||x||_1 / n) sign(x).

    A contraction: ||x - C(x)||^2 = (1 - phi^2) ||x||^2 with phi = ||x||_1 / (sqrt(n) ||x||_2), in every block. The sign
    of zero is plus. Differs from the paper in its blocks of fixed size, where the paper uses one scale a layer: a block
    stays in the cache, and more scales fit the gradient better. Wire: 1/8 byte an entry, and the scales.

    With ``bits=2`` the second bit says whether the magnitude reaches the block's mean magnitude, and is decoded as the
    mean of those that do or of those that do not. For n0 magnitudes below the mean, with the mean m0, and n1 others,
    ||x - C(x)||^2 = ||x||^2 - n0 m0^2 - n1 m1^2, which is at most what one bit loses: a block whose magnitudes have two
    values is sent exactly. Wire: 1/4 byte an entry, and two values a block.
    """

    name = "efsign"

    bits: Literal[1, 2] = Field(default=1, description="bits an entry: the sign, and with two of them a magnitude")
    block_size: int = Field(default=4096, ge=8, multiple_of=8, description="entries that share their scales")

    def converts_units(self) -> bool:
        return self.error_feedback and self.bits == 1

    def encode_with_residual(
        self, grad: torch.Tensor, feedback: Feedback | None, bucket: Bucket, state: State
    ) -> Payload:
        kernels = for_device(grad.device)
        encode = kernels.sign if self.bits == 1 else kernels.sign_and_level
        bits, scales = encode(grad, feedback, self.block_size)
        return {"scales": scales, "bits": bits}

    def decode_mean(self, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket, *, add: bool = False) -> None:
        bits, scales = ([payload[key] for payload in payloads] for key in ("bits", "scales"))
        kernels = for_device(out.device)
        decode = kernels.sign_mean if self.bits == 1 else kernels.sign_and_level_mean
        decode(bits, scales, self.block_size, out, add=add)

    def decode_mean_times(
        self, factors: torch.Tensor | None, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket
    ) -> None:
        if self.bits != 1:
            super().decode_mean_times(factors, payloads, out, bucket)
            return
        bits, scales = ([payload[key] for payload in payloads] for key in ("bits", "scales"))
        for_device(out.device).sign_mean(bits, scales, self.block_size, out, factors=factors)
