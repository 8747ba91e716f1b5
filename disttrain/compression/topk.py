"""Top-k: send the k entries of largest magnitude (Stich et al. 2018, arXiv:1809.07599)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from disttrain.compression.base import Bucket, State
from disttrain.compression.codec import FusedCodec, Payload
from disttrain.kernels import for_device


class TopK(FusedCodec):
    """Send the ``ratio`` of a bucket's entries that are largest in magnitude, as values and int32 indices.

    A contraction: ||x - C(x)||^2 <= (1 - k/d) ||x||^2. Biased, so error feedback is on by default.
    Wire: k (4 + value size) bytes a rank, all-gathered.
    """

    name = "topk"
    # The mean of W payloads has up to W k entries, of which a second encoding would keep k.
    min_two_stage_world_size: ClassVar[int] = 32

    ratio: float = Field(default=0.01, gt=0, le=1, description="share of the entries that is sent each step")

    def encode_owed(
        self, grad: torch.Tensor, residual: torch.Tensor | None, rest: torch.Tensor | None, bucket: Bucket, state: State
    ) -> Payload:
        assert grad.numel() < 2**31, "indices are int32"
        k = max(1, round(self.ratio * grad.numel()))
        values, indices = for_device(grad.device).take_largest(grad, residual, rest, k)
        return {"values": values, "indices": indices}

    def decode_mean(self, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket, *, add: bool = False) -> None:
        values, indices = ([payload[key] for payload in payloads] for key in ("values", "indices"))
        for_device(out.device).sparse_mean(values, indices, out, add=add)
