"""The program that takes the largest entries of a chunk, which is one tile of at most 4096 entries."""

from __future__ import annotations

import triton
import triton.language as tl

from disttrain.kernels.cuda.tiles import _divide, _jit, _load


@triton.jit
def _round_to_bfloat16(values):
    """Round to the nearest number of bfloat16, ties to even, and at most to its largest; by way of float32."""
    bits = values.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # A NaN may overflow here, which makes it a number; steps with NaN are skipped.
    rounded = (magnitude + ((magnitude >> 16) & 1) + 0x7FFF) & 0x7FFF0000
    rounded = tl.minimum(rounded, 0x7F7F0000).to(tl.float32, bitcast=True)
    return tl.where(bits < 0, -rounded, rounded).to(values.dtype)


@_jit
def take_of_chunk(
    grad, residual, total, values, codes, scales, positions, numel, kept, kept_of_rest, chunks,
    HAS_RESIDUAL: tl.constexpr, HAS_FEEDBACK: tl.constexpr, MAGIC: tl.constexpr,
    NUMBER_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, LEVELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, CHUNK)
    offsets = index * CHUNK + place
    inside = offsets < numel
    value = _load(grad, residual, offsets, inside, HAS_RESIDUAL)
    magnitude = tl.where(value == value, tl.abs(value), 0.0)  # NaN counts as zero
    if NUMBER_BITS == 32:
        bits = magnitude.to(tl.int32, bitcast=True)
    else:
        bits = magnitude.to(tl.int64, bitcast=True)
    bits = tl.where(inside, bits, -1)

    # The bits of the k-th magnitude, from the highest one down: the largest number that k magnitudes reach.
    k = tl.where((index + 1) * CHUNK <= numel, kept, kept_of_rest)
    kth = tl.zeros_like(tl.max(bits, axis=0))
    one = kth + 1
    for bit in range(NUMBER_BITS - 1):
        larger = kth | (one << (NUMBER_BITS - 2 - bit))
        kth = tl.where(tl.sum((bits >= larger).to(tl.int32), axis=0) >= k, larger, kth)
    above = bits > kth
    equal = bits == kth
    num_equal = k - tl.sum(above.to(tl.int32), axis=0)
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= num_equal))
    slot = index * kept + tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(positions + slot, place.to(tl.int16), mask=taken)

    if VALUE_BITS == 0:
        sent = value
        tl.store(values + slot, sent, mask=taken)
    elif VALUE_BITS == 16:
        sent = _round_to_bfloat16(value)
        tl.store(values + slot, sent, mask=taken)
    else:
        largest = tl.max(tl.where(taken, magnitude, 0.0), axis=0)
        low = tl.min(tl.where(taken, magnitude, largest), axis=0)
        step = _divide(largest - low, tl.full((), LEVELS, value.dtype))
        share = _divide(magnitude - low, tl.zeros_like(magnitude) + tl.where(step > 0, step, 1.0))
        level = tl.where(step > 0, (share + MAGIC) - MAGIC, 0.0)
        level = tl.minimum(level, LEVELS)
        sent = level * step + low
        negative = value < 0
        code = tl.where(taken, level, 0.0).to(tl.int32) | (negative.to(tl.int32) << (VALUE_BITS - 1))
        tl.store(codes + slot, code.to(tl.uint8), mask=taken)
        tl.store(scales + index, low)
        tl.store(scales + chunks + index, step)
        sent = tl.where(negative, -sent, sent)
    if HAS_FEEDBACK:
        tl.store(total + offsets, tl.where(taken, value - sent, value), mask=inside)
