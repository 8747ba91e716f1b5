"""Encoders for the mean in the second stage of an exchange, which may take more bits an entry than the gradients do.

All ranks receive what one rank encodes here, so that its error is not averaged with those of others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from disttrain.compression.base import Bucket, State
from disttrain.compression.payload import Layout, Payload
from disttrain.compression.two_stage import MeanEncoder
from disttrain.kernels import Feedback, for_device
from disttrain.kernels.blocks import empty_codes

_BLOCK = 256  # entries that share their scales


@dataclass(frozen=True)
class UniformMean:
    """Round to nearest: integer codes times max |x| / L in a block, L = 2^(bits-1) - 1. |error| <= max / 2L.

    Wire: bits/8 bytes an entry, and a value a block.
    """

    bits: int

    def encode_with_residual(
        self, grad: torch.Tensor, feedback: Feedback | None, bucket: Bucket, state: State
    ) -> Payload:
        codes, scales = for_device(grad.device).quantize(grad, feedback, self.bits, _BLOCK, None)
        return {"scales": scales, "codes": codes}

    def decode_mean(self, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket) -> None:
        self.decode_mean_times(None, payloads, out, bucket)

    def decode_mean_times(
        self, factors: torch.Tensor | None, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket
    ) -> None:
        codes, scales = ([payload[key] for payload in payloads] for key in ("codes", "scales"))
        for_device(out.device).dequantize_mean(codes, scales, self.bits, _BLOCK, out, factors=factors)

    def layout(self, bucket: Bucket) -> Layout:
        return _uniform_layout(self.bits, bucket.numel, bucket.dtype)


@dataclass(frozen=True)
class TwoSignsMean:
    """Two bits an entry: the sign times a = mean |x| of the block, and the same of what that leaves, +-a +-b.

    A contraction by 1 - phi^2 twice, as ``efsign``. Four levels by mean magnitudes lose 0.36 of the norm of a Gaussian,
    where the three levels of ``UniformMean``, up to the maximum of a block, lose 0.81 of it and send few entries.

    Wire: 1/4 byte an entry, and two values a block.
    """

    def encode_with_residual(
        self, grad: torch.Tensor, feedback: Feedback | None, bucket: Bucket, state: State
    ) -> Payload:
        feedback = feedback or Feedback.in_place(grad)
        kernels, rest = for_device(grad.device), feedback.new_residual
        first = kernels.sign(grad, feedback, _BLOCK)
        second = kernels.sign(rest, Feedback.in_place(rest), _BLOCK)
        bits, scales = (torch.stack(pair) for pair in zip(first, second, strict=True))
        return {"scales": scales, "bits": bits}

    def decode_mean(self, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket) -> None:
        self.decode_mean_times(None, payloads, out, bucket)

    def decode_mean_times(
        self, factors: torch.Tensor | None, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket
    ) -> None:
        # A sum of two codes is the mean of both of twice the size.
        bits = [row for payload in payloads for row in payload["bits"]]
        scales = [row for payload in payloads for row in 2 * payload["scales"]]
        for_device(out.device).sign_mean(bits, scales, _BLOCK, out, factors=factors)

    def layout(self, bucket: Bucket) -> Layout:
        return _two_signs_layout(bucket.numel, bucket.dtype)


def mean_encoder(bits: int) -> MeanEncoder:
    """Return the encoder that takes this many bits an entry: 2, 3, 4 or 8."""
    return TwoSignsMean() if bits == 2 else UniformMean(bits)


# Cached, since an exchange needs the layouts of all ranks' payloads in each step.


@functools.lru_cache(maxsize=1024)
def _uniform_layout(bits: int, numel: int, dtype: torch.dtype) -> Layout:
    codes, scales = empty_codes(torch.empty(numel, dtype=dtype, device="meta"), bits, _BLOCK)
    return Layout.of({"scales": scales, "codes": codes})


@functools.lru_cache(maxsize=1024)
def _two_signs_layout(numel: int, dtype: torch.dtype) -> Layout:
    bits, scales = empty_codes(torch.empty(numel, dtype=dtype, device="meta"), 1, _BLOCK)
    return Layout.of({"scales": torch.stack([scales] * 2), "bits": torch.stack([bits] * 2)})
