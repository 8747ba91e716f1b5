"""The kernels for CPUs, compiled by numba: one pass over memory each, one thread, without the GIL.

This file converts tensors to arrays and selects thresholds; the loops are in ``loops_*.py``. Compiled code is cached on
disk, and the reducer runs each compressor once before training, so that no step waits for the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from disttrain.kernels.blocks import empty_codes, num_blocks, widths
from disttrain.kernels.chunks import POSITION_BITS, Chunks, Entries, is_coded, padded
from disttrain.kernels.cpu import (
    loops_chunks,
    loops_common,
    loops_low_rank,
    loops_natural,
    loops_quantize,
    loops_sign,
    loops_sparse,
    loops_whitening,
)
from disttrain.kernels.factors import Factors, Shapes, Sizes
from disttrain.kernels.feedback import Feedback
from disttrain.kernels.reference import Tensor
from disttrain.kernels.sampling import RUN, sampled_rank, sampled_runs
from disttrain.kernels.threshold_search import ThresholdSearchKernels

_MAGIC = {torch.float32: np.float32(1.5 * 2**23), torch.float64: np.float64(1.5 * 2**52)}


class CpuKernels(ThresholdSearchKernels):
    def copy_finite(self, source: Tensor, target: Tensor) -> bool | None:
        is_same_layout = source.dtype == target.dtype and source.stride() == target.stride()
        if not is_same_layout or source.itemsize < 4 or not source.is_contiguous():
            return super().copy_finite(source, target)
        return bool(loops_common.copy_finite(source.detach().view(-1).numpy(), target.view(-1).numpy()))

    def whiten(self, grad: Tensor, scale: Tensor, sizes: Sequence[int], bound: float) -> Tensor:
        squares = torch.empty(len(sizes), dtype=torch.float64)
        loops_whitening.whiten(
            grad.numpy(), scale.numpy(), np.array(sizes), grad.numpy().dtype.type(bound), squares.numpy()
        )
        return squares

    def whitened_squares(self, grad: Tensor, scale: Tensor, sizes: Sequence[int]) -> Tensor:
        squares = torch.empty(len(sizes), dtype=torch.float64)
        loops_whitening.whitened_squares(grad.numpy(), scale.numpy(), np.array(sizes), squares.numpy())
        return squares

    def hold_second_moment(
        self, scale: Tensor, grad: Tensor, factors: tuple[float, float, float, float], out: Tensor
    ) -> None:
        tensors = (scale, grad, out)
        if any(one.dtype != scale.dtype or not one.is_contiguous() for one in tensors):
            super().hold_second_moment(scale, grad, factors, out)
            return
        arrays = [tensor.detach().view(-1).numpy() for tensor in tensors]
        loops_whitening.hold_second_moment(*arrays, *map(arrays[0].dtype.type, factors))

    def _collect(
        self, grad: Tensor, feedback: Feedback | None, threshold: float, capacity: int, *, clear: bool
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        residual, new_residual = _arrays(feedback)
        total = torch.empty_like(grad).numpy() if new_residual is None else new_residual
        values, indices = np.empty(capacity, total.dtype), np.empty(capacity, np.int32)
        bound = max(total.dtype.type(threshold), np.finfo(total.dtype).smallest_subnormal)  # leaves out zeros
        count = loops_sparse.collect(grad.numpy(), residual, total, bound, indices, values)
        values[count:], indices[count:] = 0, 0
        if clear:
            loops_sparse.set_zero(total, indices[: min(count, capacity)])
        return torch.from_numpy(total), torch.from_numpy(values), torch.from_numpy(indices), count

    def _select(self, total: Tensor, values: Tensor, indices: Tensor, k: int, *, clear: bool) -> tuple[Tensor, Tensor]:
        magnitudes = np.abs(values.numpy())
        kth = np.partition(magnitudes, len(magnitudes) - k)[len(magnitudes) - k]
        num_equal = k - np.count_nonzero(magnitudes > kth)
        largest, chosen = torch.empty(k, dtype=total.dtype), torch.empty(k, dtype=torch.int32)
        loops_sparse.select(
            total.numpy(), clear, indices.numpy(), magnitudes, kth, num_equal, largest.numpy(), chosen.numpy()
        )
        return largest, chosen

    def estimate_threshold(self, grad: Tensor, feedback: Feedback | None, share: float) -> float:
        runs, stride = sampled_runs(grad.numel(), share)
        sample = np.empty((runs, min(RUN, grad.numel())), grad.numpy().dtype)
        loops_sparse.sample(grad.numpy(), _arrays(feedback)[0], stride, sample)
        rank = sampled_rank(sample.size, share)
        return float(np.partition(sample.reshape(-1), rank)[rank])

    def sparse_mean(
        self, values: Sequence[Tensor], indices: Sequence[Tensor], out: Tensor, *, add: bool = False
    ) -> None:
        if not add:
            out.zero_()
        share = out.numpy().dtype.type(1.0 / len(values))
        for part, positions in zip(values, indices, strict=True):
            loops_sparse.scatter(part.numpy(), positions.numpy(), share, out.numpy())

    def take_largest_of_chunks(
        self, grad: Tensor, feedback: Feedback | None, chunks: Chunks, value_bits: int | None
    ) -> Entries:
        residual, new_residual = _arrays(feedback)
        total = torch.empty_like(grad).numpy() if new_residual is None else new_residual
        count, coded = chunks.count(grad.numel()), is_coded(value_bits)
        values, codes = np.empty(0 if coded else count, total.dtype), np.empty(count if coded else 0, np.uint8)
        scales = torch.empty(2, num_blocks(grad.numel(), chunks.size), dtype=grad.dtype)
        positions = np.empty(count, np.int16)
        loops_chunks.take(
            grad.numpy(), residual, total, *chunks, value_bits or 0, values, codes, scales.numpy(), positions
        )
        sent = torch.from_numpy(values)
        if is_coded(value_bits):
            sent = _pack(codes, value_bits)
        elif value_bits == 16:
            sent = sent.to(torch.bfloat16)
        return Entries(sent, scales.view(-1) if coded else scales.new_empty(0), _pack(positions, POSITION_BITS))

    def chunks_mean(
        self, parts: Sequence[Entries], chunks: Chunks, value_bits: int | None, out: Tensor, *, add: bool = False
    ) -> None:
        if not add:
            out.zero_()
        count, array = chunks.count(out.numel()), out.numpy()
        share = array.dtype.type(1.0 / len(parts))
        for part in parts:
            values, codes, scales = np.empty(0, array.dtype), np.empty(0, np.uint8), np.empty((2, 0), array.dtype)
            if is_coded(value_bits):
                codes, scales = _unpack(part.values, count, value_bits), part.scales.view(2, -1).numpy()
            else:
                values = part.values.to(out.dtype).numpy()
            positions = _unpack(part.positions, count, POSITION_BITS)
            loops_chunks.add_entries(values, codes, scales, positions, *chunks, value_bits or 0, share, array)

    def quantize(
        self, grad: Tensor, feedback: Feedback | None, bits: int, block: int, seed: int | None
    ) -> tuple[Tensor, Tensor]:
        codes, scales = empty_codes(grad, bits, block)
        loops_quantize.quantize(
            grad.numpy(), *_units(grad, feedback), *_arrays(feedback), np.array(widths(bits)), block,
            seed is not None, np.uint32((seed or 0) & 0xFFFFFFFF), _MAGIC[grad.dtype], codes.numpy(), scales.numpy(),
        )  # fmt: skip
        return codes, scales

    def dequantize_mean(
        self,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor],
        bits: int,
        block: int,
        out: Tensor,
        *,
        add: bool = False,
        factors: Tensor | None = None,
    ) -> None:
        loops_quantize.dequantize(
            _stack(codes), _stack(scales), np.array(widths(bits)), block, add, _array(factors), out.numpy()
        )

    def natural(self, grad: Tensor, feedback: Feedback | None, block: int, seed: int) -> tuple[Tensor, Tensor]:
        codes, scales = empty_codes(grad, 8, block)
        loops_natural.natural(
            grad.numpy(), *_arrays(feedback), block, np.uint32(seed & 0xFFFFFFFF), codes.numpy(), scales.numpy()
        )
        return codes, scales

    def natural_mean(
        self, codes: Sequence[Tensor], scales: Sequence[Tensor], block: int, out: Tensor, *, add: bool = False
    ) -> None:
        loops_natural.natural_mean(_stack(codes), _stack(scales), block, add, out.numpy())

    def sign(self, grad: Tensor, feedback: Feedback | None, block: int) -> tuple[Tensor, Tensor]:
        bits, scales = empty_codes(grad, 1, block)
        loops_sign.sign(grad.numpy(), *_units(grad, feedback), *_arrays(feedback), block, bits.numpy(), scales.numpy())
        return bits, scales

    def sign_mean(
        self,
        bits: Sequence[Tensor],
        scales: Sequence[Tensor],
        block: int,
        out: Tensor,
        *,
        add: bool = False,
        factors: Tensor | None = None,
    ) -> None:
        loops_sign.sign_mean(_stack(bits), _stack(scales), block, add, _array(factors), out.numpy())

    def sign_and_level(self, grad: Tensor, feedback: Feedback | None, block: int) -> tuple[Tensor, Tensor]:
        codes, low = empty_codes(grad, 2, block)
        scales = torch.empty(2, low.numel(), dtype=grad.dtype)
        loops_sign.sign_and_level(grad.numpy(), *_arrays(feedback), block, codes.numpy(), scales.numpy())
        return codes, scales.view(-1)

    def sign_and_level_mean(
        self, codes: Sequence[Tensor], scales: Sequence[Tensor], block: int, out: Tensor, *, add: bool = False
    ) -> None:
        loops_sign.sign_and_level_mean(_stack(codes), _stack(scales), block, add, out.numpy())

    def sign_vote(
        self, bits: Sequence[Tensor], weights: Sequence[Tensor], block: int, out: Tensor, *, add: bool = False
    ) -> None:
        loops_sign.sign_vote(_stack(bits), _stack(weights), block, add, out.numpy())

    def take_two_means(self, matrix: Tensor) -> Tensor:
        means = torch.empty(2, len(matrix), dtype=matrix.dtype)
        loops_sign.take_two_means(matrix.numpy(), means.numpy())
        return means

    def add_two_means(self, bits: Tensor, block: int, start: int, means: Tensor, matrix: Tensor) -> None:
        loops_sign.add_two_means(bits.numpy(), block, start, means.numpy(), matrix.numpy())

    def project(self, total: Tensor, residual: Tensor, q: Tensor, shapes: Shapes) -> Tensor:
        p = q.new_empty(sum(rank * rows for rows, _, rank in shapes))
        loops_low_rank.project(total.numpy(), residual.numpy(), np.array(shapes), q.numpy(), p.numpy())
        return p

    def project_back(self, total: Tensor, residual: Tensor | None, p: Tensor, shapes: Shapes) -> Tensor:
        q = p.new_zeros(sum(rank * columns for _, columns, rank in shapes))
        added = None if residual is None else residual.numpy()
        loops_low_rank.project_back(total.numpy(), added, np.array(shapes), p.numpy(), q.numpy())
        return q

    def low_rank_residual(
        self, total: Tensor, own: Factors, mean: Factors, new_residual: Tensor, shapes: Shapes
    ) -> None:
        if max(rank for _, _, rank in shapes) > 4:  # torch's matrix product is faster
            super().low_rank_residual(total, own, mean, new_residual, shapes)
            return
        factors = [factor.numpy() for factor in (*own, *mean)]
        loops_low_rank.low_rank_residual(total.numpy(), np.array(shapes), *factors, new_residual.numpy())

    def scale_factor(self, factor: Tensor, sizes: Sizes) -> Tensor:
        scaled = factor.clone()
        loops_low_rank.scale(scaled.numpy(), np.array(sizes))
        return scaled

    def orthogonalize(self, factor: Tensor, sizes: Sizes) -> Tensor:
        orthonormal = self.scale_factor(factor, sizes)
        loops_low_rank.orthogonalize(orthonormal.numpy(), np.array(sizes))
        return orthonormal

    def fill_zero_rows(self, factor: Tensor, other: Tensor, sizes: Sizes) -> Tensor:
        filled = factor.clone()
        loops_low_rank.fill_zero_rows(filled.numpy(), other.numpy(), np.array(sizes))
        return filled


def _units(grad: Tensor, feedback: Feedback | None) -> tuple[Any, Any]:
    """Return the scale of the units as an array, or None, and their bound."""
    real = grad.numpy().dtype.type
    if feedback is None or feedback.units is None:
        return None, real(0)
    return feedback.units.scale.numpy(), real(feedback.units.bound)


def _arrays(feedback: Feedback | None) -> tuple[Any, Any]:
    """Return ``residual`` and ``new_residual`` as arrays, None where there is none."""
    if feedback is None:
        return None, None
    return _array(feedback.residual), feedback.new_residual.numpy()


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.numpy()


def _pack(codes: Any, bits: int) -> Tensor:
    """Pack as ``chunks.pack`` does."""
    size = padded(codes.size, bits)
    padded_codes = np.zeros(size, codes.dtype)
    padded_codes[: codes.size] = codes
    packed = torch.empty(size * bits // 8, dtype=torch.uint8)
    loops_chunks.pack(padded_codes, np.array(widths(bits)), packed.numpy())
    return packed


def _unpack(packed: Tensor, count: int, bits: int) -> Any:
    """Unpack as ``chunks.unpack`` does."""
    codes = np.empty(padded(count, bits), np.uint8 if bits <= 8 else np.int16)
    loops_chunks.unpack(packed.numpy(), np.array(widths(bits)), codes)
    return codes[:count]


def _stack(parts: Sequence[Tensor]) -> Any:
    """Stack to (parts, size), without a copy if they are rows of one tensor, as gathered tensors are."""
    first = parts[0]
    step = (parts[1].data_ptr() - first.data_ptr()) // first.itemsize if len(parts) > 1 else first.numel()
    is_regular = step >= first.numel() and all(
        part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.data_ptr() - first.data_ptr() == index * step * first.itemsize
        for index, part in enumerate(parts)
    )
    if is_regular:
        return first.as_strided((len(parts), first.numel()), (step, 1)).numpy()
    return torch.stack(list(parts)).numpy()
