"""The base of codecs that send some entries, as values and indices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from disttrain.compression.base import Bucket
from disttrain.compression.codec import FusedCodec, Payload
from disttrain.kernels import for_device


class SparseCodec(FusedCodec):
    """Payloads of ``values`` and int32 ``indices``. Wire: 4 bytes and the size of a value for each entry sent."""

    def decode_mean(self, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket, *, add: bool = False) -> None:
        values, indices = ([payload[key] for payload in payloads] for key in ("values", "indices"))
        for_device(out.device).sparse_mean(values, indices, out, add=add)


def num_kept(ratio: float, numel: int) -> int:
    """Return how many of ``numel`` entries ``ratio`` keeps: at least one."""
    return max(1, round(ratio * numel))


def room_for(k: int, numel: int) -> int:
    """Return the capacity of a payload if about k of ``numel`` entries are expected."""
    return min(numel, math.ceil(1.25 * k))
