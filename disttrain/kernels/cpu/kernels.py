"""The kernels for CPUs, compiled by numba: one pass over memory each, one thread, without Python's lock.

This file turns tensors into arrays and finds thresholds; the loops are in ``loops`` and beside it. Compiled code is
cached on disk, and the reducer rehearses each compressor before training, so that no step waits for the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from disttrain.kernels.cpu import loops, loops_low_rank, loops_natural, loops_sign, loops_sparse
from disttrain.kernels.reference import (
    RUN,
    Factors,
    Kernels,
    Shapes,
    Sizes,
    Tensor,
    num_blocks,
    sampled_rank,
    sampled_runs,
    search_for_largest,
    widths,
)

_MAGIC = {torch.float32: np.float32(1.5 * 2**23), torch.float64: np.float64(1.5 * 2**52)}


class CpuKernels(Kernels):
    def copy_finite(self, source: Tensor, target: Tensor) -> bool | None:
        is_alike = source.dtype == target.dtype and source.stride() == target.stride()
        if not is_alike or source.itemsize < 4 or not source.is_contiguous():
            return super().copy_finite(source, target)
        return bool(loops.copy_finite(source.detach().view(-1).numpy(), target.view(-1).numpy()))

    def take_largest(self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        search = search_for_largest(grad.numel(), k)
        if search is None:
            return super().take_largest(grad, residual, rest, k)
        share, capacity = search
        total = torch.empty_like(grad) if rest is None else rest
        found, magnitudes = np.empty(capacity, np.int32), np.empty(capacity, grad.numpy().dtype)
        threshold = grad.numpy().dtype.type(self.estimate_threshold(grad, residual, share))
        count = loops_sparse.collect(
            grad.numpy(), _array(residual), total.numpy(), _positive(threshold), found, magnitudes
        )
        if not k <= count <= capacity:
            return super().take_largest(total, None, None if rest is None else total, k)
        found, magnitudes = found[:count], np.abs(magnitudes[:count])
        kth = np.partition(magnitudes, count - k)[count - k]
        num_equal = k - np.count_nonzero(magnitudes > kth)
        values, indices = torch.empty(k, dtype=grad.dtype), torch.empty(k, dtype=torch.int32)
        loops_sparse.pick(
            total.numpy(), rest is not None, found, magnitudes, kth, num_equal, values.numpy(), indices.numpy()
        )
        return values, indices

    def take_above(
        self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, threshold: float, capacity: int
    ) -> tuple[Tensor, Tensor, int]:
        total = torch.empty_like(grad) if rest is None else rest
        values, indices = torch.zeros(capacity, dtype=grad.dtype), torch.zeros(capacity, dtype=torch.int32)
        bound = _positive(grad.numpy().dtype.type(threshold))
        count = loops_sparse.collect(
            grad.numpy(), _array(residual), total.numpy(), bound, indices.numpy(), values.numpy()
        )
        if rest is not None:
            loops_sparse.clear(total.numpy(), indices.numpy()[: min(count, capacity)])
        return values, indices, count

    def estimate_threshold(self, grad: Tensor, residual: Tensor | None, share: float) -> float:
        runs, stride = sampled_runs(grad.numel(), share)
        sample = np.empty((runs, min(RUN, grad.numel())), grad.numpy().dtype)
        loops_sparse.sample(grad.numpy(), _array(residual), stride, sample)
        rank = sampled_rank(sample.size, share)
        return float(np.partition(sample.reshape(-1), rank)[rank])

    def sparse_mean(
        self, values: Sequence[Tensor], indices: Sequence[Tensor], out: Tensor, *, add: bool = False
    ) -> None:
        if not add:
            out.zero_()
        share = out.numpy().dtype.type(1.0 / len(values))
        for part, places in zip(values, indices, strict=True):
            loops_sparse.scatter(part.numpy(), places.numpy(), share, out.numpy())

    def quantize(
        self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, bits: int, block: int, seed: int | None
    ) -> tuple[Tensor, Tensor]:
        count = num_blocks(grad.numel(), block)
        codes = torch.empty(count * block * bits // 8, dtype=torch.uint8)
        scales = torch.empty(count, dtype=grad.dtype)
        loops.quantize(
            grad.numpy(), _array(residual), _array(rest), np.array(widths(bits)), block,
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
    ) -> None:
        loops.dequantize(_stack(codes), _stack(scales), np.array(widths(bits)), block, add, out.numpy())

    def natural(
        self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, block: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        count = num_blocks(grad.numel(), block)
        codes, scales = torch.empty(count * block, dtype=torch.uint8), torch.empty(count, dtype=grad.dtype)
        loops_natural.natural(
            grad.numpy(), _array(residual), _array(rest), block, np.uint32(seed & 0xFFFFFFFF),
            codes.numpy(), scales.numpy(),
        )  # fmt: skip
        return codes, scales

    def natural_mean(
        self, codes: Sequence[Tensor], scales: Sequence[Tensor], block: int, out: Tensor, *, add: bool = False
    ) -> None:
        loops_natural.natural_mean(_stack(codes), _stack(scales), block, add, out.numpy())

    def sign(self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
        count = num_blocks(grad.numel(), block)
        bits = torch.empty(count * block // 8, dtype=torch.uint8)
        scales = torch.empty(count, dtype=grad.dtype)
        loops_sign.sign(grad.numpy(), _array(residual), _array(rest), block, bits.numpy(), scales.numpy())
        return bits, scales

    def sign_mean(
        self, bits: Sequence[Tensor], scales: Sequence[Tensor], block: int, out: Tensor, *, add: bool = False
    ) -> None:
        loops_sign.sign_mean(_stack(bits), _stack(scales), block, add, out.numpy())

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
        loops_low_rank.project_back(total.numpy(), _array(residual), np.array(shapes), p.numpy(), q.numpy())
        return q

    def low_rank_rest(self, total: Tensor, own: Factors, mean: Factors, rest: Tensor, shapes: Shapes) -> None:
        if max(rank for _, _, rank in shapes) > 4:  # a matrix product proper, at which torch is better
            super().low_rank_rest(total, own, mean, rest, shapes)
            return
        factors = [factor.numpy() for factor in (*own, *mean)]
        loops_low_rank.low_rank_rest(total.numpy(), np.array(shapes), *factors, rest.numpy())

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


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.numpy()


def _positive(threshold: Any) -> Any:
    """No zero may count as large enough."""
    return max(threshold, np.finfo(threshold.dtype).smallest_subnormal)


def _stack(parts: Sequence[Tensor]) -> Any:
    """(parts, size), without a copy where they are the rows of one tensor, as gathered tensors are."""
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
