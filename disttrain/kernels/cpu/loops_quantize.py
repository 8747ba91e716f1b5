"""The compiled loops of uniform quantization."""

from __future__ import annotations

import numpy as np

from disttrain.kernels.cpu.intrinsics import borrow, keep
from disttrain.kernels.cpu.loops_common import (
    copy,
    inline,
    jit,
    jit_borrowed,
    jit_finite,
    largest_magnitude,
    load_converted_block,
    mix,
    store_mean,
    store_mean_times,
)


@jit_finite
def _round(work, inverse, scale, levels, magic, code, error):
    """Round to the nearest levels; write the codes, and the rounding errors to ``error``."""
    for i in range(work.size):
        # Adding a number so large that it leaves no bits for a fraction rounds to the nearest integer, ties to even.
        rounded = (work[i] * inverse + magic) - magic
        rounded = min(max(rounded, -levels), levels)
        code[i] = np.uint8(rounded + levels)
        error[i] = work[i] - rounded * scale


@jit_finite
def _round_at_random(work, inverse, scale, levels, first, seed, code, error):
    real = work.dtype.type
    half = code.size // 2
    low, high, low_code, high_code = work[:half], work[half:], code[:half], code[half:]
    low_error, high_error = error[:half], error[half:]
    for i in range(half):
        noise = mix(np.uint32(np.uint64(np.uint32(first + i)) * np.uint64(0x9E3779B9) + np.uint64(seed)))
        rounded = np.floor(low[i] * inverse + real(np.int32(noise & np.uint32(0xFFFF))) * real(2.0**-16))
        rounded = min(max(rounded, -levels), levels)
        low_code[i] = np.uint8(rounded + levels)
        low_error[i] = low[i] - rounded * scale
        rounded = np.floor(high[i] * inverse + real(np.int32(noise >> np.uint32(16))) * real(2.0**-16))
        rounded = min(max(rounded, -levels), levels)
        high_code[i] = np.uint8(rounded + levels)
        high_error[i] = high[i] - rounded * scale


@jit
def quantize(grad, scale, bound, residual, new_residual, widths, block, is_random, seed, magic, codes, scales):
    work, spare, unpacked = np.empty(block, grad.dtype), np.empty(block, grad.dtype), np.empty(block, np.uint8)
    borrowed = borrow(grad, scale, residual, new_residual, widths, codes, scales, work, spare, unpacked)
    _quantize(*borrowed, bound, block, is_random, seed, magic)
    keep(work, spare, unpacked)


@jit_borrowed
def _quantize(
    grad,
    units,
    residual,
    new_residual,
    widths,
    codes,
    scales,
    work,
    spare,
    unpacked,
    bound,
    block,
    is_random,
    seed,
    magic,
):  # fmt: skip
    real = grad.dtype.type
    bits = widths.sum()
    levels = real((1 << (bits - 1)) - 1)
    tiny = np.finfo(grad.dtype).tiny
    length = block * bits // 8
    for index in range(scales.size):
        start = index * block
        size = load_converted_block(grad, units, bound, residual, start, work)
        scale = largest_magnitude(work) / levels
        if not scale >= tiny:
            scale = real(0)
        scales[index] = scale
        inverse = real(1) / scale if scale > 0 else real(0)
        error = spare  # not ``work``: the loops below are faster if arrays do not overlap
        if new_residual is not None and size == block:
            error = new_residual[start : start + block]
        packed = codes[index * length : (index + 1) * length]
        code = packed if bits == 8 else unpacked
        if is_random:
            _round_at_random(work, inverse, scale, levels, index * (block // 2), seed, code, error)
        else:
            _round(work, inverse, scale, levels, magic, code, error)
        if new_residual is not None and size < block:
            copy(spare[:size], new_residual[start : start + size])
        if bits < 8:
            pack_planes(code, widths, packed)


@inline
def pack_planes(code, widths, packed):
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


@inline
def unpack_planes(packed, widths, code):
    shift, offset = 0, 0
    for width in widths:
        length = code.size * width // 8
        part = packed[offset : offset + length]
        if width == 8:
            copy(part, code)
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
                        codes[i] |= codes.dtype.type(((part[i] >> (plane * width)) & mask) << shift)
        shift += width
        offset += length


@jit
def dequantize(codes, scales, widths, block, add, factors, out):
    work, code = np.empty(block, out.dtype), np.empty(block, np.uint8)
    _dequantize(*borrow(codes, scales, widths, factors, out, work, code), block, add)
    keep(work, code)


@jit_borrowed
def _dequantize(codes, scales, widths, factors, out, work, code, block, add):
    real = out.dtype.type
    bits = widths.sum()
    levels = real((1 << (bits - 1)) - 1)
    length = block * bits // 8
    is_one = codes.shape[0] == 1 and factors is None
    for index in range(scales.shape[1]):
        values = out[index * block : (index + 1) * block]
        for part in range(codes.shape[0]):
            unpack_planes(codes[part, index * length : (index + 1) * length], widths, code)
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
        if factors is not None:
            store_mean_times(factors[index * block : (index + 1) * block], work, real(codes.shape[0]), add, values)
        elif not is_one:
            store_mean(work, real(codes.shape[0]), add, values)
