"""1-bit SGD: one bit an entry and two means a column (Seide et al. 2014, Interspeech)."""

from __future__ import annotations

from typing import ClassVar

import torch

from disttrain.compression.base import Bucket, State
from disttrain.compression.codec import Codec, Payload
from disttrain.kernels import for_device

_BLOCK = 4096  # entries of a block in the layout of the bits


class OneBit(Codec):
    """Send the signs, and for each column the means of its negative and of its other entries.

    The best one-bit code for given signs: ||x - C(x)||^2 = ||x||^2 - n0 m0^2 - n1 m1^2 in a column with n0 entries of
    mean m0, n1 of mean m1. Biased, so error feedback is on. A column holds the weights of one output unit: it is a row
    of the parameter's matrix here, dimension 0 against all the others, as torch stores weights transposed.

    Differs from the paper in the exchange: payloads are all-gathered and averaged exactly, where the paper sums chunks
    and quantizes the sums again. Wire: 1/8 byte an entry, and two values a column.
    """

    name = "onebit"
    by_element: ClassVar[bool] = False  # a chunk would split columns

    def encode(self, acc: torch.Tensor, bucket: Bucket, state: State) -> Payload:
        kernels = for_device(acc.device)
        bits, _ = kernels.sign(acc, None, _BLOCK)
        means = [kernels.take_two_means(matrix).view(-1) for matrix in bucket.matrices(acc)]
        return {"means": torch.cat(means), "bits": bits}

    def decode_add(self, payload: Payload, out: torch.Tensor, bucket: Bucket) -> None:
        kernels, start = for_device(out.device), 0
        means = payload["means"].split([2 * rows for rows, _ in bucket.matrix_shapes])
        for matrix, pair in zip(bucket.matrices(out), means, strict=True):
            kernels.add_two_means(payload["bits"], _BLOCK, start, pair.view(2, -1), matrix)
            start += matrix.numel()
