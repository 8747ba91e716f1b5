"""Natural compression: powers of two at random (Horvath et al. 2019, arXiv:1905.10988)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from disttrain.compression.base import Bucket, State
from disttrain.compression.codec import FusedCodec, Payload
from disttrain.kernels import Feedback, for_device


class Natural(FusedCodec):
    """Round every magnitude at random to the power of two below or above, so that its expectation is exact.

    Unbiased, E||Q(x) - x||^2 <= ||x||^2 / 8, so error feedback is off by default. Entries of all sizes have the same
    relative error.

    Differs from the paper in the code, of 8 bits instead of 9: the sign, and an exponent of 7 bits relative to the
    block's maximum. Entries more than 2^126 times smaller than that are rounded to zero or up to this bound, which is
    still unbiased.
    Wire: 1 byte an entry, and the size of a value a block.
    """

    name = "natural"

    error_feedback: bool = Field(default=False, description="add the rounding error to the next gradient")
    block_size: int = Field(default=512, ge=16, multiple_of=16, description="entries whose exponents share a maximum")
    seed: int = Field(default=0, description="of the private random generators")

    def encode_with_residual(
        self, grad: torch.Tensor, feedback: Feedback | None, bucket: Bucket, state: State
    ) -> Payload:
        # Ranks must round independently, so that their errors average out.
        seed = bucket.seed(self.seed, state.step, per_rank=True)
        codes, scales = for_device(grad.device).natural(grad, feedback, self.block_size, seed)
        return {"scales": scales, "codes": codes}

    def decode_mean(self, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket, *, add: bool = False) -> None:
        codes, scales = ([payload[key] for payload in payloads] for key in ("codes", "scales"))
        for_device(out.device).natural_mean(codes, scales, self.block_size, out, add=add)
