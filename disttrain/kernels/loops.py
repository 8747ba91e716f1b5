"""The compiled loops of the CPU kernels.

A block is worked on in the first-level cache (``work``), so that reading ``grad`` and ``residual`` and writing ``rest``
are all the traffic there is. Loops run from 0 over slices: only then does the compiler see that no index is negative,
and use SIMD lanes.
"""

from __future__ import annotations

import numba
import numpy as np

_jit = numba.njit(nogil=True, cache=True)
# No NaN and no -0 to care for (finiteness is judged elsewhere): minima and maxima run in SIMD lanes, still exactly.
_finite = numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
_reordered_nan = numba.njit(nogil=True, cache=True, fastmath={"reassoc"})
_reordered = numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz", "reassoc"})
_inline = numba.njit(nogil=True, cache=True, inline="always")


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


@_jit
def collect(grad, residual, total, threshold, indices, values):
    """``total = grad + residual``; all that reach the threshold, as far as they fit; how many there are."""
    count, capacity = 0, indices.size
    for i in range(grad.size):
        value = grad[i]
        if residual is not None:
            value += residual[i]
        total[i] = value
        if abs(value) >= threshold:
            if count < capacity:
                indices[count] = i
                values[count] = value
            count += 1
    return count


@_jit
def sample(grad, residual, stride, sample):
    for run in range(sample.shape[0]):
        for i in range(sample.shape[1]):
            value = grad[run * stride + i]
            if residual is not None:
                value += residual[run * stride + i]
            sample[run, i] = abs(value)


@_jit
def pick(total, has_rest, indices, magnitude, kth, num_equal, values, chosen):
    count = 0
    for i in range(indices.size):
        if magnitude[i] > kth or (magnitude[i] == kth and num_equal > 0):
            if magnitude[i] == kth:
                num_equal -= 1
            place = indices[i]
            chosen[count] = place
            values[count] = total[place]
            if has_rest:
                total[place] = 0
            count += 1


@_jit
def clear(total, indices):
    for i in range(indices.size):
        total[indices[i]] = 0


@_jit
def scatter(values, indices, share, out):
    for i in range(values.size):
        out[indices[i]] += values[i] * share


@_inline
def _hash(x):
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(np.uint64(x) * np.uint64(0x85EBCA6B))
    x = np.uint32(x ^ (x >> np.uint32(13)))
    x = np.uint32(np.uint64(x) * np.uint64(0xC2B2AE35))
    return np.uint32(x ^ (x >> np.uint32(16)))


@_finite
def _largest(work):
    largest = work.dtype.type(0)
    for i in range(work.size):
        largest = max(largest, abs(work[i]))
    return largest


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
    real = grad.dtype.type
    bits = widths.sum()
    levels = real((1 << (bits - 1)) - 1)
    tiny = np.finfo(grad.dtype).tiny
    work = np.empty(block, grad.dtype)
    spare = np.empty(block, grad.dtype)
    code = np.empty(block, np.uint8)
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
        if is_random:
            _round_at_random(work, inverse, scale, levels, index * (block // 2), seed, code, left)
        else:
            _round(work, inverse, scale, levels, magic, code, left)
        if rest is not None and size < block:
            _copy(spare[:size], rest[start : start + size])
        _pack(code, widths, codes[index * length : (index + 1) * length])


@_inline
def _pack(code, widths, packed):
    shift, offset = 0, 0
    for width in widths:
        length = code.size * width // 8
        part = packed[offset : offset + length]
        if width == 8:
            _copy(code, part)
        elif width == 4 and shift == 0:
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
    real = out.dtype.type
    bits = widths.sum()
    levels = real((1 << (bits - 1)) - 1)
    work = np.empty(block, out.dtype)
    code = np.empty(block, np.uint8)
    length = block * bits // 8
    for index in range(scales.shape[1]):
        values = out[index * block : (index + 1) * block]
        for part in range(codes.shape[0]):
            _unpack(codes[part, index * length : (index + 1) * length], widths, code)
            scale = scales[part, index]
            if add and codes.shape[0] == 1:
                for i in range(values.size):
                    values[i] += (real(code[i]) - levels) * scale
            elif part == 0:
                for i in range(block):
                    work[i] = (real(code[i]) - levels) * scale
            else:
                for i in range(block):
                    work[i] += (real(code[i]) - levels) * scale
        if not (add and codes.shape[0] == 1):
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


@_reordered
def _sum_of_magnitudes(work):
    total = work.dtype.type(0)
    for i in range(work.size):
        total += abs(work[i])
    return total


@_finite
def _pack_signs(work, packed):
    n = packed.size
    p0, p1, p2, p3 = work[:n], work[n : 2 * n], work[2 * n : 3 * n], work[3 * n : 4 * n]
    p4, p5, p6, p7 = work[4 * n : 5 * n], work[5 * n : 6 * n], work[6 * n : 7 * n], work[7 * n :]
    for i in range(n):
        # Products instead of shifts: the compiler keeps them in eight bits.
        low = np.uint8(p0[i] < 0) | np.uint8(np.uint8(p1[i] < 0) * np.uint8(2))
        low |= np.uint8(np.uint8(p2[i] < 0) * np.uint8(4)) | np.uint8(np.uint8(p3[i] < 0) * np.uint8(8))
        high = np.uint8(np.uint8(p4[i] < 0) * np.uint8(16)) | np.uint8(np.uint8(p5[i] < 0) * np.uint8(32))
        high |= np.uint8(np.uint8(p6[i] < 0) * np.uint8(64)) | np.uint8(np.uint8(p7[i] < 0) * np.uint8(128))
        packed[i] = low | high


@_jit
def sign(grad, residual, rest, block, bits, scales):
    work = np.empty(block, grad.dtype)
    length = block // 8
    for index in range(scales.size):
        start = index * block
        size = _load(grad, residual, start, work)
        scale = _sum_of_magnitudes(work) / grad.dtype.type(size)
        scales[index] = scale
        _pack_signs(work, bits[index * length : (index + 1) * length])
        if rest is not None:
            left = rest[start : start + size]
            for i in range(size):
                left[i] = work[i] - (-scale if work[i] < 0 else scale)


@_inline
def _sum_signs(bits, scales, index, work):
    """``work`` = the sum over all payloads of plus or minus the scale of this block."""
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


@_jit
def sign_mean(bits, scales, block, add, out):
    work = np.empty(block, out.dtype)
    for index in range(scales.shape[1]):
        _sum_signs(bits, scales, index, work)
        _store_mean(work, out.dtype.type(bits.shape[0]), add, out[index * block : (index + 1) * block])


@_jit
def sign_vote(bits, weights, block, add, out):
    real = out.dtype.type
    work = np.empty(block, out.dtype)
    for index in range(weights.shape[1]):
        _sum_signs(bits, weights, index, work)
        for i in range(block):
            work[i] = real(work[i] > 0) - real(work[i] < 0)
        _store_mean(work, real(1), add, out[index * block : (index + 1) * block])


@_jit
def take_two_means(matrix, means):
    """The mean of each row's negative entries and that of its others, taken out of them."""
    for row in range(matrix.shape[0]):
        below, above = _two_means(matrix[row])
        means[0, row], means[1, row] = below, above
        values = matrix[row]
        for i in range(values.size):
            values[i] -= below if values[i] < 0 else above


@_reordered
def _two_means(values):
    real = values.dtype.type
    below, above, count = real(0), real(0), 0
    for i in range(values.size):
        is_below = values[i] < 0
        below += values[i] if is_below else real(0)
        above += real(0) if is_below else values[i]
        count += 1 if is_below else 0
    return below / real(max(count, 1)), above / real(max(values.size - count, 1))


@_jit
def add_two_means(bits, block, start, means, matrix):
    """Add each entry's mean, by its sign: bit ``start`` of the blocks' planes belongs to the matrix's first entry."""
    length = block // 8
    place = start
    for row in range(matrix.shape[0]):
        below, above = means[0, row], means[1, row]
        first = 0
        while first < matrix.shape[1]:  # by stretches of one plane, whose bytes are neighbours
            plane, byte = place % block // length, place % length
            values = matrix[row][first : first + length - byte]
            packed = bits[place // block * length + byte :]
            bit = np.uint8(1 << plane)
            for i in range(values.size):
                values[i] += below if packed[i] & bit else above
            first += values.size
            place += values.size


@_reordered
def _dot(row, factor):
    total = row.dtype.type(0)
    for i in range(row.size):
        total += row[i] * factor[i]
    return total


@_jit
def project(grad, residual, total, q, p):
    for row in range(grad.shape[0]):
        _load(grad[row], None if residual is None else residual[row], 0, total[row])
        for k in range(q.shape[0]):
            p[k, row] = _dot(total[row], q[k])


@_reordered
def _add_rows(r0, r1, r2, r3, f0, f1, f2, f3, out):
    for i in range(out.size):
        out[i] += f0 * r0[i] + f1 * r1[i] + f2 * r2[i] + f3 * r3[i]


@_reordered
def _add_row(row, factor, out):
    for i in range(out.size):
        out[i] += factor * row[i]


@_jit
def project_back(total, p, q):
    rows = total.shape[0]
    for row in range(0, rows - 3, 4):
        r0, r1, r2, r3 = total[row], total[row + 1], total[row + 2], total[row + 3]
        for k in range(q.shape[0]):
            _add_rows(r0, r1, r2, r3, p[k, row], p[k, row + 1], p[k, row + 2], p[k, row + 3], q[k])
    for row in range(rows // 4 * 4, rows):
        for k in range(q.shape[0]):
            _add_row(total[row], p[k, row], q[k])


@_reordered
def _low_rank_row(left, out, p0, p1, p2, p3, q0, q1, q2, q3, mp0, mp1, mp2, mp3, mq0, mq1, mq2, mq3):
    for i in range(left.size):
        left[i] -= p0 * q0[i] + p1 * q1[i] + p2 * q2[i] + p3 * q3[i]
        out[i] = mp0 * mq0[i] + mp1 * mq1[i] + mp2 * mq2[i] + mp3 * mq3[i]


@_jit
def low_rank_rest(total, p, q, mean_p, mean_q, out):
    """For factors of four rows; those of fewer come filled up with zeros."""
    q0, q1, q2, q3, mq0, mq1, mq2, mq3 = q[0], q[1], q[2], q[3], mean_q[0], mean_q[1], mean_q[2], mean_q[3]
    for row in range(total.shape[0]):
        p0, p1, p2, p3 = p[0, row], p[1, row], p[2, row], p[3, row]
        mp0, mp1, mp2, mp3 = mean_p[0, row], mean_p[1, row], mean_p[2, row], mean_p[3, row]
        _low_rank_row(total[row], out[row], p0, p1, p2, p3, q0, q1, q2, q3, mp0, mp1, mp2, mp3, mq0, mq1, mq2, mq3)


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
