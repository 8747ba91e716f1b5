"""The programs that run on the GPU, compiled by Triton. Each processes one tile of a vector.

A block of codes is a tile (PLANES, LENGTH), whose rows are the planes of the packed form. Triton does not specialize on
numbers that change from step to step or from bucket to bucket, so that nothing is compiled after the first run. It does
specialize on ``numel``, since vectors of a multiple of 16 entries can be read 16 bytes at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

_jit = triton.jit(do_not_specialize=["capacity", "count", "blocks", "seed", "kept", "kept_of_rest", "chunks"])


@triton.jit
def _load(grad, residual, offsets, inside, HAS_RESIDUAL: tl.constexpr):
    values = tl.load(grad + offsets, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        values += tl.load(residual + offsets, mask=inside, other=0.0)
    return values


@triton.jit
def _divide(a, b):
    """Divide with IEEE 754 rounding, which Triton's own division of float32 does not have."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def _reaches(values, bound):
    return (tl.abs(values) >= tl.load(bound)) & (values != 0)


@_jit
def count_above(
    grad, residual, total, bound, counts, numel, HAS_RESIDUAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    offsets = index * TILE + tl.arange(0, TILE)
    inside = offsets < numel
    values = _load(grad, residual, offsets, inside, HAS_RESIDUAL)
    if HAS_RESIDUAL:
        tl.store(total + offsets, values, mask=inside)
    tl.store(counts + index, tl.sum(_reaches(values, bound).to(tl.int32), axis=0))


@_jit
def write_above(
    total, bound, starts, found_values, found_indices, numel, capacity, CLEAR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    offsets = index * TILE + tl.arange(0, TILE)
    values = tl.load(total + offsets, mask=offsets < numel, other=0.0)
    found = _reaches(values, bound)
    rank = tl.load(starts + index) + tl.cumsum(found.to(tl.int32), axis=0) - 1
    taken = found & (rank < capacity)
    tl.store(found_values + rank, values, mask=taken)
    tl.store(found_indices + rank, offsets.to(tl.int32), mask=taken)
    if CLEAR:
        tl.store(total + offsets, tl.zeros_like(values), mask=taken)


@_jit
def quantize(
    grad, residual, new_residual, codes, scales, numel, seed,
    HAS_RESIDUAL: tl.constexpr, HAS_FEEDBACK: tl.constexpr, AT_RANDOM: tl.constexpr,
    TINY: tl.constexpr, MAGIC: tl.constexpr,
    LEVELS: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    plane = tl.arange(0, PLANES)[:, None]
    place = plane * LENGTH + tl.arange(0, LENGTH)[None, :]
    offsets = index * (PLANES * LENGTH) + place
    inside = offsets < numel
    values = _load(grad, residual, offsets, inside, HAS_RESIDUAL)
    scale = _divide(tl.max(tl.max(tl.abs(values), axis=1), axis=0), tl.full((), LEVELS, values.dtype))
    scale = tl.where(scale >= TINY, scale, 0.0)
    inverse = tl.where(scale > 0, _divide(tl.full((), 1.0, scale.dtype), tl.where(scale > 0, scale, 1.0)), 0.0)
    scaled = values * inverse
    if AT_RANDOM:
        half = PLANES * LENGTH // 2
        pair = index.to(tl.uint32) * half + (place % half).to(tl.uint32)
        x = pair * 0x9E3779B9 + seed.to(tl.uint32)
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        x = x ^ (x >> 16)
        noise = tl.where(place < half, x & 0xFFFF, x >> 16).to(values.dtype) * 0.0000152587890625
        rounded = tl.floor(scaled + noise)
    else:
        rounded = (scaled + MAGIC) - MAGIC
    rounded = tl.minimum(tl.maximum(rounded, -LEVELS), LEVELS)
    packed = tl.sum((rounded + LEVELS).to(tl.int32) << (plane * BITS), axis=0)
    tl.store(codes + index * LENGTH + tl.arange(0, LENGTH), packed.to(tl.uint8))
    tl.store(scales + index, scale)
    if HAS_FEEDBACK:
        tl.store(new_residual + offsets, values - rounded * scale, mask=inside)


@_jit
def dequantize(
    codes, scales, factors, out, numel, count, blocks,
    ADD: tl.constexpr, HAS_FACTORS: tl.constexpr, LEVELS: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    LENGTH: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    plane = tl.arange(0, PLANES)[:, None]
    column = tl.arange(0, LENGTH)[None, :]
    offsets = index * (PLANES * LENGTH) + plane * LENGTH + column
    inside = offsets < numel
    total = tl.zeros((PLANES, LENGTH), dtype=out.dtype.element_ty)
    for part in range(count):
        packed = tl.load(codes + (part * blocks + index) * LENGTH + column).to(tl.int32)
        code = (packed >> (plane * BITS)) & ((1 << BITS) - 1)
        total += (code - LEVELS).to(total.dtype) * tl.load(scales + part * blocks + index)
    _store_mean(factors, out, total, count, offsets, inside, ADD, HAS_FACTORS)


@triton.jit
def _store_mean(factors, out, total, count, offsets, inside, ADD: tl.constexpr, HAS_FACTORS: tl.constexpr):
    mean = _divide(total, count.to(total.dtype))
    if HAS_FACTORS:
        mean *= tl.load(factors + offsets, mask=inside, other=0.0)
    if ADD:
        mean += tl.load(out + offsets, mask=inside, other=0.0)
    tl.store(out + offsets, mean, mask=inside)


@_jit
def sign(
    grad, residual, new_residual, bits, scales, numel,
    HAS_RESIDUAL: tl.constexpr, HAS_FEEDBACK: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    plane = tl.arange(0, 8)[:, None]
    offsets = index * (8 * LENGTH) + plane * LENGTH + tl.arange(0, LENGTH)[None, :]
    inside = offsets < numel
    values = _load(grad, residual, offsets, inside, HAS_RESIDUAL)
    size = tl.minimum(8 * LENGTH, numel - index * (8 * LENGTH))
    scale = _divide(tl.sum(tl.sum(tl.abs(values), axis=1), axis=0), size.to(values.dtype))
    negative = values < 0
    packed = tl.sum(negative.to(tl.int32) << plane, axis=0)
    tl.store(bits + index * LENGTH + tl.arange(0, LENGTH), packed.to(tl.uint8))
    tl.store(scales + index, scale)
    if HAS_FEEDBACK:
        tl.store(new_residual + offsets, values - tl.where(negative, -scale, scale), mask=inside)


@_jit
def sign_mean(
    bits, scales, factors, out, numel, count, blocks,
    ADD: tl.constexpr, HAS_FACTORS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    plane = tl.arange(0, 8)[:, None]
    column = tl.arange(0, LENGTH)[None, :]
    offsets = index * (8 * LENGTH) + plane * LENGTH + column
    inside = offsets < numel
    total = tl.zeros((8, LENGTH), dtype=out.dtype.element_ty)
    for part in range(count):
        packed = tl.load(bits + (part * blocks + index) * LENGTH + column).to(tl.int32)
        scale = tl.load(scales + part * blocks + index)
        total += tl.where(((packed >> plane) & 1) != 0, -scale, scale)
    _store_mean(factors, out, total, count, offsets, inside, ADD, HAS_FACTORS)


@_jit
def sign_and_level(
    grad, residual, new_residual, codes, scales, numel, blocks,
    HAS_RESIDUAL: tl.constexpr, HAS_FEEDBACK: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    plane = tl.arange(0, 4)[:, None]
    offsets = index * (4 * LENGTH) + plane * LENGTH + tl.arange(0, LENGTH)[None, :]
    inside = offsets < numel
    values = _load(grad, residual, offsets, inside, HAS_RESIDUAL)
    magnitude = tl.abs(values)
    size = tl.minimum(4 * LENGTH, numel - index * (4 * LENGTH)).to(values.dtype)
    mean = _divide(tl.sum(tl.sum(magnitude, axis=1), axis=0), size)
    upper = magnitude >= mean
    num_upper = tl.sum(tl.sum((upper & inside).to(values.dtype), axis=1), axis=0)
    low = tl.sum(tl.sum(tl.where(upper, 0.0, magnitude), axis=1), axis=0)
    high = tl.sum(tl.sum(tl.where(upper, magnitude, 0.0), axis=1), axis=0)
    low = _divide(low, tl.maximum(size - num_upper, 1.0))
    high = _divide(high, tl.maximum(num_upper, 1.0))
    negative = values < 0
    code = negative.to(tl.int32) | (upper.to(tl.int32) << 1)
    packed = tl.sum(code << (2 * plane), axis=0)
    tl.store(codes + index * LENGTH + tl.arange(0, LENGTH), packed.to(tl.uint8))
    tl.store(scales + index, low)
    tl.store(scales + blocks + index, high)
    if HAS_FEEDBACK:
        sent = tl.where(upper, high, low)
        tl.store(new_residual + offsets, values - tl.where(negative, -sent, sent), mask=inside)


@_jit
def sign_and_level_mean(codes, scales, out, numel, count, blocks, ADD: tl.constexpr, LENGTH: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    plane = tl.arange(0, 4)[:, None]
    column = tl.arange(0, LENGTH)[None, :]
    offsets = index * (4 * LENGTH) + plane * LENGTH + column
    inside = offsets < numel
    total = tl.zeros((4, LENGTH), dtype=out.dtype.element_ty)
    for part in range(count):
        packed = tl.load(codes + (part * blocks + index) * LENGTH + column).to(tl.int32)
        low = tl.load(scales + 2 * part * blocks + index)
        high = tl.load(scales + (2 * part + 1) * blocks + index)
        code = packed >> (2 * plane)
        magnitude = tl.where((code & 2) != 0, high, low)
        total += tl.where((code & 1) != 0, -magnitude, magnitude)
    _store_mean(out, out, total, count, offsets, inside, ADD, False)
