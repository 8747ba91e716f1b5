"""The compiled loops of the CPU kernels: what they share, and quantization.

A block is worked on in the first-level cache (``work``), so that reading ``grad`` and ``residual`` and writing ``rest``
are all the traffic there is. Loops run from 0 over slices: only then does the compiler see that no index is negative,
and use SIMD lanes. Each kernel lends its arrays to the function of its loops: slices of owned ones would be counted.
"""

from __future__ import annotations

import numpy as np

from disttrain.kernels.cpu.compiling import compiled
from disttrain.kernels.cpu.intrinsics import borrow, from_bits, keep, magnitude_bits

_jit = compiled()
# No NaN and no -0 to care for (finiteness is judged elsewhere): clamping runs in SIMD lanes, still exactly.
_finite = compiled(fastmath={"nnan", "nsz"})
_reordered_nan = compiled(fastmath={"reassoc"})
_reordered = compiled(fastmath={"nnan", "nsz", "reassoc"})
_inline = compiled(inline="always")
# Inlined by LLVM, which then knows that nothing of what is lent has to be counted.
_lent = compiled(forceinline=True)


@_inline
def _load(grad, residual, start, work):
    """``work`` = the entries from ``start`` on, zeros behind the end of the vector; how many there are."""
    size = min(work.size, grad.size - start)
    own = grad[start : start + size]
    if residual is None:
        for i in range(size):
            work[i] = own[i]
    else:
        owed = residual[start : start + size]
        for i in range(size):
            work[i] = own[i] + owed[i]
    if size < work.size:
        work[size:] = 0
    return size


@_inline
def _copy(source, target):
    for i in range(source.size):
        target[i] = source[i]


@_inline
def _hash(x):
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(np.uint64(x) * np.uint64(0x85EBCA6B))
    x = np.uint32(x ^ (x >> np.uint32(13)))
    x = np.uint32(np.uint64(x) * np.uint64(0xC2B2AE35))
    return np.uint32(x ^ (x >> np.uint32(16)))


@_jit
def _largest(work):
    """The largest magnitude; NaN if there is one."""
    largest = magnitude_bits(work.dtype.type(0))
    for i in range(work.size):
        largest = max(largest, magnitude_bits(work[i]))
    return from_bits(largest)


@_finite
def _round(work, inverse, scale, levels, magic, code, left):
    """Codes of the nearest levels; what they miss goes to ``left``."""
    for i in range(work.size):
        # Adding a number so large that no fraction fits behind it rounds to the nearest integer, ties to even.
        rounded = (work[i] * inverse + magic) - magic
        rounded = min(max(rounded, -levels), levels)
        code[i] = np.uint8(rounded + levels)
        left[i] = work[i] - rounded * scale


@_finite
def _round_at_random(work, inverse, scale, levels, first, seed, code, left):
    real = work.dtype.type
    half = code.size // 2
    low, high, low_code, high_code = work[:half], work[half:], code[:half], code[half:]
    low_left, high_left = left[:half], left[half:]
    for i in range(half):
        noise = _hash(np.uint32(np.uint64(np.uint32(first + i)) * np.uint64(0x9E3779B9) + np.uint64(seed)))
        rounded = np.floor(low[i] * inverse + real(np.int32(noise & np.uint32(0xFFFF))) * real(2.0**-16))
        rounded = min(max(rounded, -levels), levels)
        low_code[i] = np.uint8(rounded + levels)
        low_left[i] = low[i] - rounded * scale
        rounded = np.floor(high[i] * inverse + real(np.int32(noise >> np.uint32(16))) * real(2.0**-16))
        rounded = min(max(rounded, -levels), levels)
        high_code[i] = np.uint8(rounded + levels)
        high_left[i] = high[i] - rounded * scale


@_jit
def quantize(grad, residual, rest, widths, block, is_random, seed, magic, codes, scales):
    work, spare, unpacked = np.empty(block, grad.dtype), np.empty(block, grad.dtype), np.empty(block, np.uint8)
    lent = borrow(grad, residual, rest, widths, codes, scales, work, spare, unpacked)
    _quantize(*lent, block, is_random, seed, magic)
    keep(work, spare, unpacked)


@_lent
def _quantize(grad, residual, rest, widths, codes, scales, work, spare, unpacked, block, is_random, seed, magic):
    real = grad.dtype.type
    bits = widths.sum()
    levels = real((1 << (bits - 1)) - 1)
    tiny = np.finfo(grad.dtype).tiny
    length = block * bits // 8
    for index in range(scales.size):
        start = index * block
        size = _load(grad, residual, start, work)
        scale = _largest(work) / levels
        if not scale >= tiny:
            scale = real(0)
        scales[index] = scale
        inverse = real(1) / scale if scale > 0 else real(0)
        left = spare  # never ``work``: the loops below are fast where they need not care for what overlaps
        if rest is not None and size == block:
            left = rest[start : start + block]
        packed = codes[index * length : (index + 1) * length]
        code = packed if bits == 8 else unpacked
        if is_random:
            _round_at_random(work, inverse, scale, levels, index * (block // 2), seed, code, left)
        else:
            _round(work, inverse, scale, levels, magic, code, left)
        if rest is not None and size < block:
            _copy(spare[:size], rest[start : start + size])
        if bits < 8:
            _pack(code, widths, packed)


@_inline
def _pack(code, widths, packed):
    shift, offset = 0, 0
    for width in widths:
        length = code.size * width // 8
        part = packed[offset : offset + length]
        if width == 4 and shift == 0:
            low, high = code[:length], code[length:]
            for i in range(length):
                part[i] = (low[i] & np.uint8(15)) | np.uint8(high[i] * np.uint8(16))
        else:
            mask = (1 << width) - 1
            part[:] = 0
            for plane in range(8 // width):
                codes = code[plane * length : (plane + 1) * length]
                for i in range(length):
                    part[i] |= np.uint8(((codes[i] >> shift) & mask) << (plane * width))
        shift += width
        offset += length


@_inline
def _unpack(packed, widths, code):
    shift, offset = 0, 0
    for width in widths:
        length = code.size * width // 8
        part = packed[offset : offset + length]
        if width == 8:
            _copy(part, code)
        elif width == 4 and shift == 0:
            low, high = code[:length], code[length:]
            for i in range(length):
                low[i] = part[i] & np.uint8(15)
                high[i] = part[i] >> np.uint8(4)
        elif width == 2 and shift == 0:
            c0, c1, c2, c3 = code[:length], code[length : 2 * length], code[2 * length : 3 * length], code[3 * length :]
            for i in range(length):
                c0[i] = part[i] & np.uint8(3)
                c1[i] = (part[i] >> np.uint8(2)) & np.uint8(3)
                c2[i] = (part[i] >> np.uint8(4)) & np.uint8(3)
                c3[i] = part[i] >> np.uint8(6)
        else:
            mask = (1 << width) - 1
            for plane in range(8 // width):
                codes = code[plane * length : (plane + 1) * length]
                if shift == 0:
                    for i in range(length):
                        codes[i] = np.uint8((part[i] >> (plane * width)) & mask)
                else:
                    for i in range(length):
                        codes[i] |= np.uint8(((part[i] >> (plane * width)) & mask) << shift)
        shift += width
        offset += length


@_jit
def dequantize(codes, scales, widths, block, add, out):
    work, code = np.empty(block, out.dtype), np.empty(block, np.uint8)
    _dequantize(*borrow(codes, scales, widths, out, work, code), block, add)
    keep(work, code)


@_lent
def _dequantize(codes, scales, widths, out, work, code, block, add):
    real = out.dtype.type
    bits = widths.sum()
    levels = real((1 << (bits - 1)) - 1)
    length = block * bits // 8
    is_one = codes.shape[0] == 1
    for index in range(scales.shape[1]):
        values = out[index * block : (index + 1) * block]
        for part in range(codes.shape[0]):
            _unpack(codes[part, index * length : (index + 1) * length], widths, code)
            scale = scales[part, index]
            if is_one and add:
                for i in range(values.size):
                    values[i] += (real(code[i]) - levels) * scale
            elif is_one:
                for i in range(values.size):
                    values[i] = (real(code[i]) - levels) * scale
            elif part == 0:
                for i in range(block):
                    work[i] = (real(code[i]) - levels) * scale
            else:
                for i in range(block):
                    work[i] += (real(code[i]) - levels) * scale
        if not is_one:
            _store_mean(work, real(codes.shape[0]), add, values)


@_inline
def _store_mean(work, count, add, out):
    if add and count == 1:
        for i in range(out.size):
            out[i] += work[i]
    elif add:
        for i in range(out.size):
            out[i] += work[i] / count
    else:
        for i in range(out.size):
            out[i] = work[i] / count


@_reordered_nan
def _copy_and_watch(source, target):
    watch = source.dtype.type(0)
    for i in range(source.size):
        target[i] = source[i]
        watch += source[i] * source.dtype.type(0)  # stays 0, but for an inf or a NaN
    return watch


@_jit
def copy_finite(source, target):
    return _copy_and_watch(source, target) == 0
