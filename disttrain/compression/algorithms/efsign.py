"""EF-signSGD: one bit an entry, with error feedback (Karimireddy et al. 2019, arXiv:1901.09847)."""

from __future__ import annotations

from collections.abc import Sequence

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
    """

    name = "efsign"

    block_size: int = Field(default=4096, ge=8, multiple_of=8, description="entries that share one scale")

    def encode_with_residual(
        self, grad: torch.Tensor, feedback: Feedback | None, bucket: Bucket, state: State
    ) -> Payload:
        bits, scales = for_device(grad.device).sign(grad, feedback, self.block_size)
        return {"scales": scales, "bits": bits}

    def decode_mean(self, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket, *, add: bool = False) -> None:
        bits, scales = ([payload[key] for payload in payloads] for key in ("bits", "scales"))
        for_device(out.device).sign_mean(bits, scales, self.block_size, out, add=add)
