"""Top-k: send the k entries of largest magnitude (Stich et al. 2018, arXiv:1809.07599)."""

from __future__ import annotations

import torch
from pydantic import Field

from disttrain.compression.base import Bucket, State
from disttrain.compression.codec import Codec, Payload


class TopK(Codec):
    """Send the ``ratio`` of a bucket's entries that are largest in magnitude, as values and int32 indices.

    A contraction: ||x - C(x)||^2 <= (1 - k/d) ||x||^2. Biased, so error feedback is on by default.
    Wire: k (4 + value size) bytes a rank, all-gathered.
    """

    name = "topk"

    ratio: float = Field(default=0.01, gt=0, le=1, description="share of the entries that is sent each step")

    def encode(self, acc: torch.Tensor, bucket: Bucket, state: State) -> Payload:
        assert acc.numel() < 2**31, "indices are int32"
        k = max(1, round(self.ratio * acc.numel()))
        indices = acc.abs().topk(k, sorted=False).indices
        values = acc[indices]
        acc[indices] = 0
        return {"values": values, "indices": indices.to(torch.int32)}

    def decode_add(self, payload: Payload, out: torch.Tensor, bucket: Bucket) -> None:
        # Indices within one payload are distinct, so the order of additions cannot matter on any device.
        out.index_add_(0, payload["indices"].long(), payload["values"])
