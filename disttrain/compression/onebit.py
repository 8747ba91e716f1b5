"""1-bit SGD: one bit an entry and two means a column (Seide et al. 2014, Interspeech)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from disttrain.compression.base import Bucket, State
from disttrain.compression.codec import Codec, Payload
from disttrain.kernels import for_device, num_blocks

_BLOCK = 4096  # of the bits' layout


class OneBit(Codec):
    """Send the signs, and for each column the means of its negative and of its other entries.

    The best one-bit code for given signs: ||x - C(x)||^2 = ||x||^2 - n0 m0^2 - n1 m1^2 in a column with n0 entries of
    mean m0, n1 of mean m1. Biased, so error feedback is on. A column holds the weights of one output unit: it is a row
    of the parameter's matrix here, dimension 0 against all the others, as torch stores weights transposed.

    Differs in the exchange: payloads are all-gathered and averaged exactly, where the paper sums stretches and
    quantizes the sums again. Wire: 1/8 byte an entry, and two values a column.
    """

    name = "onebit"
    by_element: ClassVar[bool] = False  # a stretch would cut columns

    def encode(self, acc: torch.Tensor, bucket: Bucket, state: State) -> Payload:
        bits, _ = for_device(acc.device).sign(acc, None, None, _BLOCK)
        means = []
        for matrix in bucket.matrices(acc):
            negative = matrix < 0
            count = negative.sum(1)
            below = torch.where(negative, matrix, 0).sum(1) / count.clamp(min=1)
            above = torch.where(negative, 0, matrix).sum(1) / (matrix.shape[1] - count).clamp(min=1)
            matrix -= torch.where(negative, below.unsqueeze(1), above.unsqueeze(1))
            means.append(torch.stack([below, above]).view(-1))
        return {"means": torch.cat(means), "bits": bits}

    def decode_add(self, payload: Payload, out: torch.Tensor, bucket: Bucket) -> None:
        signs = torch.empty_like(out)
        ones = torch.ones(num_blocks(out.numel(), _BLOCK), dtype=out.dtype, device=out.device)
        for_device(out.device).sign_mean([payload["bits"]], [ones], _BLOCK, signs)
        for matrix, sign, (below, above) in zip(
            bucket.matrices(out), bucket.matrices(signs), self._means(payload, bucket), strict=True
        ):
            matrix += torch.where(sign < 0, below.unsqueeze(1), above.unsqueeze(1))

    @staticmethod
    def _means(payload: Payload, bucket: Bucket) -> Iterator[torch.Tensor]:
        """(2, rows) of every matrix."""
        sizes = [2 * rows for rows, _ in bucket.matrix_shapes]
        for part in payload["means"].split(sizes):
            yield part.view(2, -1)
