"""The compiled loops of codes of one or two bits."""

from __future__ import annotations

import numpy as np

from disttrain.kernels.cpu.intrinsics import borrow, keep
from disttrain.kernels.cpu.loops_common import (
    inline,
    jit,
    jit_borrowed,
    jit_finite,
    jit_reordered,
    load_block,
    load_converted_block,
    store_mean,
    store_mean_times,
)


@jit_reordered
def _sum_of_magnitudes(work):
    total = work.dtype.type(0)
    for i in range(work.size):
        total += abs(work[i])
    return total


@jit_finite
def _pack_signs(work, packed):
    n = packed.size
    p0, p1, p2, p3 = work[:n], work[n : 2 * n], work[2 * n : 3 * n], work[3 * n : 4 * n]
    p4, p5, p6, p7 = work[4 * n : 5 * n], work[5 * n : 6 * n], work[6 * n : 7 * n], work[7 * n :]
    for i in range(n):
        # Products instead of shifts, since the compiler keeps these in eight bits.
        low = np.uint8(p0[i] < 0) | np.uint8(np.uint8(p1[i] < 0) * np.uint8(2))
        low |= np.uint8(np.uint8(p2[i] < 0) * np.uint8(4)) | np.uint8(np.uint8(p3[i] < 0) * np.uint8(8))
        high = np.uint8(np.uint8(p4[i] < 0) * np.uint8(16)) | np.uint8(np.uint8(p5[i] < 0) * np.uint8(32))
        high |= np.uint8(np.uint8(p6[i] < 0) * np.uint8(64)) | np.uint8(np.uint8(p7[i] < 0) * np.uint8(128))
        packed[i] = low | high


@jit
def sign(grad, scale, bound, residual, new_residual, block, bits, scales):
    work = np.empty(block, grad.dtype)
    _sign(*borrow(grad, scale, residual, new_residual, bits, scales, work), bound, block)
    keep(work)


@jit_borrowed
def _sign(grad, units, residual, new_residual, bits, scales, work, bound, block):
    length = block // 8
    for index in range(scales.size):
        start = index * block
        size = load_converted_block(grad, units, bound, residual, start, work)
        scale = _sum_of_magnitudes(work) / grad.dtype.type(size)
        scales[index] = scale
        _pack_signs(work, bits[index * length : (index + 1) * length])
        if new_residual is not None:
            error = new_residual[start : start + size]
            for i in range(size):
                error[i] = work[i] - (-scale if work[i] < 0 else scale)


@inline
def _sum_signs(bits, scales, index, work):
    """Write to ``work`` the sum over all payloads of plus or minus their scale of this block."""
    length = work.size // 8
    for part in range(bits.shape[0]):
        scale = scales[part, index]
        packed = bits[part, index * length : (index + 1) * length]
        for plane in range(8):
            values, bit = work[plane * length : (plane + 1) * length], np.uint8(1 << plane)
            if part == 0:
                for i in range(length):
                    values[i] = -scale if packed[i] & bit else scale
            else:
                for i in range(length):
                    values[i] += -scale if packed[i] & bit else scale


@jit
def sign_mean(bits, scales, block, add, factors, out):
    work = np.empty(block, out.dtype)
    _sign_mean(*borrow(bits, scales, factors, out, work), block, add)
    keep(work)


@jit_borrowed
def _sign_mean(bits, scales, factors, out, work, block, add):
    for index in range(scales.shape[1]):
        _sum_signs(bits, scales, index, work)
        count, start, end = out.dtype.type(bits.shape[0]), index * block, (index + 1) * block
        if factors is None:
            store_mean(work, count, add, out[start:end])
        else:
            store_mean_times(factors[start:end], work, count, add, out[start:end])


@jit_reordered
def _means_of_levels(values, mean):
    """Return the mean of the magnitudes below ``mean``, and of the others."""
    zero, one = values.dtype.type(0), values.dtype.type(1)
    low, high, num_high = zero, zero, zero
    for i in range(values.size):
        magnitude = abs(values[i])
        low += zero if magnitude >= mean else magnitude
        high += magnitude if magnitude >= mean else zero
        num_high += one if magnitude >= mean else zero
    return low / max(values.dtype.type(values.size) - num_high, one), high / max(num_high, one)


@inline
def _code(value, mean):
    return np.uint8(value < 0) | np.uint8(np.uint8(abs(value) >= mean) * np.uint8(2))


@jit_finite
def _pack_codes(work, mean, packed):
    n = packed.size
    p0, p1, p2, p3 = work[:n], work[n : 2 * n], work[2 * n : 3 * n], work[3 * n :]
    for i in range(n):
        # Products instead of shifts, since the compiler keeps these in eight bits.
        low = _code(p0[i], mean) | np.uint8(_code(p1[i], mean) * np.uint8(4))
        high = np.uint8(_code(p2[i], mean) * np.uint8(16)) | np.uint8(_code(p3[i], mean) * np.uint8(64))
        packed[i] = low | high


@jit
def sign_and_level(grad, residual, new_residual, block, codes, scales):
    work = np.empty(block, grad.dtype)
    _sign_and_level(*borrow(grad, residual, new_residual, codes, scales, work), block)
    keep(work)


@jit_borrowed
def _sign_and_level(grad, residual, new_residual, codes, scales, work, block):
    length = block // 4
    for index in range(scales.shape[1]):
        start = index * block
        size = load_block(grad, residual, start, work)
        mean = _sum_of_magnitudes(work) / grad.dtype.type(size)
        low, high = _means_of_levels(work[:size], mean)
        scales[0, index], scales[1, index] = low, high
        _pack_codes(work, mean, codes[index * length : (index + 1) * length])
        if new_residual is not None:
            error = new_residual[start : start + size]
            for i in range(size):
                sent = high if abs(work[i]) >= mean else low
                error[i] = work[i] - (-sent if work[i] < 0 else sent)


@jit
def sign_and_level_mean(codes, scales, block, add, out):
    work = np.empty(block, out.dtype)
    _sign_and_level_mean(*borrow(codes, scales, out, work), block, add)
    keep(work)


@jit_borrowed
def _sign_and_level_mean(codes, scales, out, work, block, add):
    length, num_blocks = block // 4, scales.shape[1] // 2
    for index in range(num_blocks):
        for part in range(codes.shape[0]):
            low, high = scales[part, index], scales[part, num_blocks + index]
            packed = codes[part, index * length : (index + 1) * length]
            for plane in range(4):
                values = work[plane * length : (plane + 1) * length]
                negative, upper = np.uint8(1 << (2 * plane)), np.uint8(2 << (2 * plane))
                if part == 0:
                    for i in range(length):
                        magnitude = high if packed[i] & upper else low
                        values[i] = -magnitude if packed[i] & negative else magnitude
                else:
                    for i in range(length):
                        magnitude = high if packed[i] & upper else low
                        values[i] += -magnitude if packed[i] & negative else magnitude
        store_mean(work, out.dtype.type(codes.shape[0]), add, out[index * block : (index + 1) * block])


@jit
def sign_vote(bits, weights, block, add, out):
    work = np.empty(block, out.dtype)
    _sign_vote(*borrow(bits, weights, out, work), block, add)
    keep(work)


@jit_borrowed
def _sign_vote(bits, weights, out, work, block, add):
    real = out.dtype.type
    for index in range(weights.shape[1]):
        _sum_signs(bits, weights, index, work)
        values = out[index * block : (index + 1) * block]
        if add:
            for i in range(values.size):
                values[i] += real(work[i] > 0) - real(work[i] < 0)
        else:
            for i in range(values.size):
                values[i] = real(work[i] > 0) - real(work[i] < 0)


@jit
def take_two_means(matrix, means):
    _take_two_means(*borrow(matrix, means))


@jit_borrowed
def _take_two_means(matrix, means):
    for row in range(matrix.shape[0]):
        below, above = _two_means(matrix[row])
        means[0, row], means[1, row] = below, above
        values = matrix[row]
        for i in range(values.size):
            values[i] -= below if values[i] < 0 else above


@jit_reordered
def _two_means(values):
    real = values.dtype.type
    below, above, count = real(0), real(0), 0
    for i in range(values.size):
        is_below = values[i] < 0
        below += values[i] if is_below else real(0)
        above += real(0) if is_below else values[i]
        count += 1 if is_below else 0
    return below / real(max(count, 1)), above / real(max(values.size - count, 1))


@jit
def add_two_means(bits, block, start, means, matrix):
    _add_two_means(*borrow(bits, means, matrix), block, start)


@jit_borrowed
def _add_two_means(bits, means, matrix, block, start):
    length = block // 8
    place = start
    for row in range(matrix.shape[0]):
        below, above = means[0, row], means[1, row]
        first = 0
        while first < matrix.shape[1]:  # a run of entries whose bits are in one plane, in neighboring bytes
            plane, byte = place % block // length, place % length
            values = matrix[row][first : first + length - byte]
            packed = bits[place // block * length + byte :]
            bit = np.uint8(1 << plane)
            for i in range(values.size):
                values[i] += below if packed[i] & bit else above
            first += values.size
            place += values.size
