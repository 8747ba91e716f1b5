"""The programs that run on the GPU for PowerSGD, compiled by Triton. Each processes a factor (rank, size), or a row.

A barrier separates a write from the reads of other threads. The interpreter has one thread, so it cannot tell whether a
barrier is missing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from disttrain.kernels.cuda.tiles import _divide


@triton.jit
def _find_factor(plan):
    entry = plan + 4 * tl.program_id(0)
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def _largest(vector, begin, end, TILE: tl.constexpr):
    largest = tl.zeros((TILE,), dtype=vector.dtype.element_ty)
    for start in range(begin, end, TILE):
        place = start + tl.arange(0, TILE)
        largest = tl.maximum(largest, tl.abs(tl.load(vector + place, mask=place < end, other=0.0)))
    return tl.max(largest, axis=0)


@triton.jit
def _copy_divided(source, target, begin, end, divisor, TILE: tl.constexpr):
    for start in range(begin, end, TILE):
        place = start + tl.arange(0, TILE)
        values = tl.load(source + place, mask=place < end, other=0.0)
        tl.store(target + place, _divide(values, divisor), mask=place < end)


@triton.jit
def _dot(a, b, begin, end, TILE: tl.constexpr):
    """Return the dot product, in float64: in float32 long rows would be orthogonal only to three digits."""
    total = tl.zeros((TILE,), dtype=tl.float64)
    for start in range(begin, end, TILE):
        place = start + tl.arange(0, TILE)
        inside = place < end
        left, right = tl.load(a + place, mask=inside, other=0.0), tl.load(b + place, mask=inside, other=0.0)
        total += left.to(tl.float64) * right.to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _make_reflector(row, first, size, TILE: tl.constexpr):
    """Turn ``row`` into the vector that reflects it to its first axis; return 2 / |vector|^2, or 0 for zeros."""
    largest = _largest(row, first, size, TILE)
    tl.debug_barrier()
    _copy_divided(row, row, first, size, tl.where(largest > 0, largest, 1.0), TILE)
    tl.debug_barrier()
    length = tl.sqrt(_dot(row, row, first, size, TILE))
    head = tl.load(row + first)
    tl.debug_barrier()
    tl.store(row + first, head + tl.where(head >= 0, length, -length).to(head.dtype))
    tl.debug_barrier()
    square = _dot(row, row, first, size, TILE)
    return tl.where(square > 0, 2 / tl.where(square > 0, square, 1.0), 0.0)


@triton.jit
def _reflect(reflector, strength, row, first, size, TILE: tl.constexpr):
    part = (strength * _dot(reflector, row, first, size, TILE)).to(row.dtype.element_ty)
    tl.debug_barrier()
    for start in range(first, size, TILE):
        place = start + tl.arange(0, TILE)
        inside = place < size
        values = tl.load(row + place, mask=inside, other=0.0)
        removed = part * tl.load(reflector + place, mask=inside, other=0.0)
        tl.store(row + place, values - removed, mask=inside)
    tl.debug_barrier()


@triton.jit
def orthogonalize(factor, orthonormal, strengths, plan, TILE: tl.constexpr):
    """Use Householder reflections, as on the CPU. Overwrites ``factor``; ``orthonormal`` must be zeros."""
    start, rank, size, before = _find_factor(plan)
    reflectors, spanning = factor + start, orthonormal + start
    for k in range(rank):
        strength = _make_reflector(reflectors + k * size, k, size, TILE)
        tl.store(strengths + before + k, strength)
        for j in range(k + 1, rank):
            _reflect(reflectors + k * size, strength, reflectors + j * size, k, size, TILE)
    tl.debug_barrier()
    for done in range(rank):
        k = rank - 1 - done
        strength = tl.load(strengths + before + k)
        tl.store(spanning + k * size + k, 1.0)
        tl.debug_barrier()
        for j in range(k, rank):
            _reflect(reflectors + k * size, strength, spanning + j * size, k, size, TILE)


@triton.jit
def scale(factor, scaled, plan, TILE: tl.constexpr):
    start, rank, size, _ = _find_factor(plan)
    largest = _largest(factor + start, 0, rank * size, TILE)
    divisor = tl.where(largest > 0, largest, 1.0)
    _copy_divided(factor + start, scaled + start, 0, rank * size, divisor, TILE)


@triton.jit
def fill_zero_rows(factor, other, filled, plan, TILE: tl.constexpr):
    start, _, size, _ = _find_factor(plan)
    count = tl.zeros((TILE,), dtype=tl.int32)
    for begin in range(0, size, TILE):
        place = begin + tl.arange(0, TILE)
        count += (tl.load(factor + start + place, mask=place < size, other=0.0) != 0).to(tl.int32)
    is_zero = tl.sum(count, axis=0) == 0
    for begin in range(0, size, TILE):
        place = start + begin + tl.arange(0, TILE)
        inside = begin + tl.arange(0, TILE) < size
        own, before = tl.load(factor + place, mask=inside, other=0.0), tl.load(other + place, mask=inside, other=0.0)
        tl.store(filled + place, tl.where(is_zero, before, own), mask=inside)
