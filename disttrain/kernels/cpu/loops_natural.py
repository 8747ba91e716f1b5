"""The compiled loops of natural compression."""

from __future__ import annotations

import math

import numpy as np

from disttrain.kernels.cpu.intrinsics import borrow, keep
from disttrain.kernels.cpu.loops_common import (
    jit,
    jit_borrowed,
    jit_finite,
    largest_magnitude,
    load_block,
    mix,
    store_mean,
)


@jit_finite
def _round_at_random(work, bits, first, seed, code):
    half = code.size // 2
    low, high, low_bits, high_bits = work[:half], work[half:], bits[:half], bits[half:]
    low_code, high_code = code[:half], code[half:]
    for i in range(half):
        noise = mix(np.uint32(np.uint64(np.uint32(first + i)) * np.uint64(0x9E3779B9) + np.uint64(seed)))
        exponent = min((low_bits[i] + np.int32((noise & np.uint32(0xFFFF)) << np.uint32(7))) >> 23, 127)
        low_code[i] = np.uint8(exponent | (128 if low[i] < 0 else 0))
        exponent = min((high_bits[i] + np.int32((noise >> np.uint32(16)) << np.uint32(7))) >> 23, 127)
        high_code[i] = np.uint8(exponent | (128 if high[i] < 0 else 0))


@jit_finite
def _powers(code, bits):
    """Decode in units of the scale, as the bits of float32 numbers."""
    for i in range(code.size):
        sign, exponent = np.int32(code[i] & np.uint8(128)), np.int32(code[i] & np.uint8(127))
        bits[i] = (sign << np.int32(24)) | (exponent << np.int32(23))


@jit
def natural(grad, residual, new_residual, block, seed, codes, scales):
    work, magnitudes, bits = np.empty(block, grad.dtype), np.empty(block, np.float32), np.empty(block, np.int32)
    _natural(*borrow(grad, residual, new_residual, codes, scales, work, magnitudes, bits), block, seed)
    keep(work, magnitudes, bits)


@jit_borrowed
def _natural(grad, residual, new_residual, codes, scales, work, magnitudes, bits, block, seed):
    real = grad.dtype.type
    info = np.finfo(grad.dtype)
    last_exponent = math.frexp(info.max)[1] - 1
    powers = bits.view(np.float32)
    for index in range(scales.size):
        start = index * block
        size = load_block(grad, residual, start, work)
        largest = largest_magnitude(work)
        scale = inverse = real(0)
        if largest >= info.tiny:
            scale = real(math.ldexp(1.0, min(math.frexp(largest)[1], last_exponent)))
            inverse = real(1) / scale
        scales[index] = scale
        for i in range(block):
            magnitudes[i] = abs(work[i]) * inverse
        code = codes[start : start + block]
        _round_at_random(work, magnitudes.view(np.int32), index * (block // 2), seed, code)
        if new_residual is not None:
            error = new_residual[start : start + size]
            _powers(code, bits)
            for i in range(size):
                error[i] = work[i] - real(powers[i]) * scale


@jit
def natural_mean(codes, scales, block, add, out):
    work, bits = np.empty(block, out.dtype), np.empty(block, np.int32)
    _natural_mean(*borrow(codes, scales, out, work, bits), block, add)
    keep(work, bits)


@jit_borrowed
def _natural_mean(codes, scales, out, work, bits, block, add):
    real = out.dtype.type
    powers = bits.view(np.float32)
    is_one = codes.shape[0] == 1
    for index in range(scales.shape[1]):
        values = out[index * block : (index + 1) * block]
        for part in range(codes.shape[0]):
            scale = scales[part, index]
            _powers(codes[part, index * block : (index + 1) * block], bits)
            if is_one and add:
                for i in range(values.size):
                    values[i] += real(powers[i]) * scale
            elif is_one:
                for i in range(values.size):
                    values[i] = real(powers[i]) * scale
            elif part == 0:
                for i in range(block):
                    work[i] = real(powers[i]) * scale
            else:
                for i in range(block):
                    work[i] += real(powers[i]) * scale
        if not is_one:
            store_mean(work, real(codes.shape[0]), add, values)
