"""TernGrad: three levels at random (Wen et al. 2017, arXiv:1705.07878)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from disttrain.compression.algorithms.quantizer import Quantizer
from disttrain.compression.base import Bucket, State
from disttrain.compression.codec import Payload
from disttrain.kernels import Feedback, for_device


class TernGrad(Quantizer):
    """Send -1, 0 or 1 for every entry, in 2 bits: m sign(x) with probability |x| / m, else 0, for m = max |x|.

    Unbiased after clipping, with E||Q(x) - x||^2 = m ||x||_1 - ||x||^2 in every block. Clipping at 2.5 standard
    deviations (the authors' value) reduces m and so the error, at the cost of a bias that is small for Gaussian
    gradients. Error feedback is off by default; with it, what was clipped is sent later.

    Differs from the paper in the scale, one a block instead of one a layer, which has a smaller error, and in the
    standard deviation of a layer, taken around zero. Wire: 1/4 byte an entry, and the size of a value a block.
    """

    name = "terngrad"
    rounds_at_random: ClassVar[bool] = True

    clip: float | None = Field(
        default=2.5, gt=0, description="standard deviations of its layer at which an entry is clipped; null: nowhere"
    )
    error_feedback: bool = Field(default=False, description="add what was clipped or rounded off to the next gradient")

    @property
    def width(self) -> int:
        return 2

    def encode_with_residual(
        self, grad: torch.Tensor, feedback: Feedback | None, bucket: Bucket, state: State
    ) -> Payload:
        if self.clip is None:
            return super().encode_with_residual(grad, feedback, bucket, state)
        total = for_device(grad.device).add_residual(grad, feedback)
        clipped = total.clone()
        for layer in bucket.split(clipped):
            # In float64, so that squares of float32 numbers cannot overflow.
            deviation = float(torch.linalg.vector_norm(layer, dtype=torch.float64)) / max(1, layer.numel()) ** 0.5
            if deviation > 0:
                layer.clamp_(-self.clip * deviation, self.clip * deviation)
        if feedback is None:
            return super().encode_with_residual(clipped, None, bucket, state)
        total.sub_(clipped)  # what was clipped
        payload = super().encode_with_residual(clipped, Feedback.in_place(clipped), bucket, state)
        total.add_(clipped)  # what was rounded off
        return payload
