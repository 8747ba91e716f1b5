"""Top-k: send the k entries of largest magnitude (Stich et al. 2018, arXiv:1809.07599)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from disttrain.compression.algorithms.sparse import SparseCodec, num_kept, room_for
from disttrain.compression.base import Bucket, State
from disttrain.compression.codec import Payload
from disttrain.compression.ramp import RatioRamp
from disttrain.kernels import Feedback, for_device


class TopK(SparseCodec):
    """Send the entries of a bucket that are largest in magnitude, a share of ``ratio``, as values and int32 indices.

    A contraction: ||x - C(x)||^2 <= (1 - k/d) ||x||^2. Biased, so error feedback is on by default.
    Wire: k (4 + value size) bytes a rank, all-gathered.

    ``selection="estimated"`` sends the entries above a threshold estimated from a sample, as DGC's authors do: about k
    entries (0.8 to 1.25 k for usual distributions), without a search for the k-th. The payload has room for 1.25 k and
    is padded with zeros. The bound above then holds with the number of entries that were sent.
    """

    name = "topk"
    # The mean of W payloads has up to W k entries, of which a second encoding keeps only k.
    min_two_stage_world_size: ClassVar[int] = 32

    ratio: float = Field(default=0.01, gt=0, le=1, description="share of the entries that is sent each step")
    ratio_ramp: RatioRamp | None = Field(default=None, description="start and steps of a ramp to `ratio`")
    selection: Literal["exact", "estimated"] = Field(
        default="exact", description="exactly k entries, or all above a threshold estimated from a sample"
    )

    def encode_with_residual(
        self, grad: torch.Tensor, feedback: Feedback | None, bucket: Bucket, state: State
    ) -> Payload:
        assert grad.numel() < 2**31, "indices are int32"
        ratio = self.ratio if self.ratio_ramp is None else self.ratio_ramp.at(state.step, self.ratio)
        k = num_kept(ratio, grad.numel())
        kernels = for_device(grad.device)
        if self.selection == "exact":
            values, indices = kernels.take_largest(grad, feedback, k)
        else:
            threshold = kernels.estimate_threshold(grad, feedback, k / grad.numel())
            values, indices, _ = kernels.take_above(grad, feedback, threshold, room_for(k, grad.numel()))
        return {"values": values, "indices": indices}
