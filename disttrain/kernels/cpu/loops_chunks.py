"""The compiled loops of sparsification in chunks.

A chunk is searched while it is in the cache. The first pass over it collects the entries above a bound, guessed from
the chunk before, and only if these are too few does it take more passes. The result does not depend on the guess.
"""

from __future__ import annotations

import numpy as np

from disttrain.kernels.cpu.intrinsics import (
    LANES,
    add_and_compare,
    borrow,
    halfway,
    keep,
    lowest_bit,
    round_to_bfloat16,
)
from disttrain.kernels.cpu.loops_common import inline, jit, jit_borrowed, jit_reassociated, largest_magnitude
from disttrain.kernels.cpu.loops_quantize import pack_planes, unpack_planes

# The guess in units of the k-th magnitude of the chunk before. It falls whenever too few entries reach it, and rises
# otherwise, so that one chunk in 20 needs more passes. Fewer would cost more entries to select from in all the others.
_FIRST_FACTOR, _FALL, _RISE = 0.95, 0.98, 1.001


@jit_reassociated
def _count(values, bound):
    """Return how many magnitudes reach the bound."""
    one = values.dtype.type(1)
    count = values.dtype.type(0)  # a float, which the compiler keeps as narrow as the values
    for i in range(values.size):
        count += one if abs(values[i]) >= bound else one - one
    return int(count)


@jit
def _find_bound(values, k, guess):
    """Return a bound that at least k magnitudes reach, and not many more, or as few as ties allow.

    ``guess`` is one that fewer reach.
    """
    low, high = values.dtype.type(0), guess
    if _count(values, np.nextafter(low, high)) < k:
        return low
    bound = high / values.dtype.type(2)
    while low < bound < high:
        count = _count(values, bound)
        if count < k:
            high = bound
        else:
            low = bound
            if count <= 2 * k + LANES:
                break
        bound = halfway(low, high)
    return low


@inline
def _collect(grad, residual, total, start, size, bound, found, places):
    """Write ``grad + residual`` to ``total``, and the entries that reach the bound, which is positive.

    Returns:
        Their number.
    """
    count = 0
    whole = size // LANES * LANES
    for group in range(0, whole, LANES):
        above = add_and_compare(grad, residual, total, start + group, bound)
        while above:
            place = group + np.int64(lowest_bit(above))
            found[count] = total[start + place]
            places[count] = place
            count += 1
            above &= above - np.uint64(1)
    for place in range(whole, size):
        value = grad[start + place]
        if residual is not None:
            value += residual[start + place]
        total[start + place] = value
        if abs(value) >= bound:
            found[count] = value
            places[count] = place
            count += 1
    return count


@jit
def _keep_largest(found, places, k, low):
    """Move the k largest entries to the front, in order, and return the magnitude of the last.

    All reach ``low``, or it is zero. Among equal magnitudes, and among zeros and NaN, the first entries are kept.
    """
    largest = largest_magnitude(found)
    high, num_high = found.dtype.type(np.nan), 0  # none reaches NaN
    if largest == largest and _count(found, largest) >= k:
        low = largest
    elif largest == largest:
        high, num_high = largest, _count(found, largest)
        bound = halfway(low, high)
        while low < bound < high:
            count = _count(found, bound)
            if count >= k:
                low = bound
            if count <= k:
                high, num_high = bound, count
            bound = halfway(low, high)
    num_equal = k - num_high
    kept = 0
    for i in range(found.size):
        magnitude = abs(found[i])
        is_equal = (not magnitude >= high) & (not magnitude < low) & (num_equal > 0)
        num_equal -= is_equal
        found[kept], places[kept] = found[i], places[i]
        kept += (magnitude >= high) | is_equal
        if kept == k:
            break
    return low


@jit
def take(grad, residual, total, chunk, kept, kept_of_rest, bits, values, codes, scales, positions):
    """Take the largest entries of each chunk, and subtract from ``total`` what is sent of them.

    ``values`` are written if ``bits`` is 0 or 16, else ``codes`` and ``scales``.
    """
    found, places = np.empty(chunk, grad.dtype), np.empty(chunk, np.int16)
    _take(
        *borrow(grad, residual, total, values, codes, scales, positions, found, places),
        chunk,
        kept,
        kept_of_rest,
        bits,
    )
    keep(found, places)


@jit_borrowed
def _take(grad, residual, total, values, codes, scales, positions, found, places, chunk, kept, kept_of_rest, bits):
    real = grad.dtype.type
    guess, factor, offset = real(np.inf), real(_FIRST_FACTOR), 0
    for index in range(scales.shape[1]):
        start = index * chunk
        size = min(chunk, grad.size - start)
        k = kept if size == chunk else kept_of_rest
        count = _collect(grad, residual, total, start, size, guess, found, places)
        bound = guess
        factor = min(factor * real(_RISE), real(1))
        if count < k:
            factor *= real(_FALL)
            bound = _find_bound(total[start : start + size], k, guess)
            if bound > 0:
                count = _collect(total, None, total, start, size, bound, found, places)
            else:
                count = size
                for place in range(size):
                    found[place] = total[start + place]
                    places[place] = place
        kth = _keep_largest(found[:count], places[:count], k, bound)
        if kth > 0 and kth < np.inf:
            guess = max(kth * factor, np.nextafter(real(0), kth))
        end = offset + k
        positions[offset:end] = places[:k]
        if bits == 0:
            values[offset:end] = found[:k]
            found[:k] = 0
        elif bits == 16:
            for i in range(k):
                sent = round_to_bfloat16(found[i])
                values[offset + i] = sent
                found[i] -= sent
        else:
            scales[0, index], scales[1, index] = _round(found[:k], bits, codes[offset:end])
        for i in range(k):
            total[start + places[i]] = found[i]
        offset = end


@inline
def _round(values, bits, codes):
    """Write the codes, and the rounding errors to ``values``; return the smallest magnitude and the step."""
    real = values.dtype.type
    levels = real((1 << (bits - 1)) - 1)
    low = high = abs(values[0])
    for i in range(1, values.size):
        low, high = min(low, abs(values[i])), max(high, abs(values[i]))
    step = (high - low) / levels
    for i in range(values.size):
        level = min(np.rint((abs(values[i]) - low) / step), levels) if step > 0 else real(0)
        sent = level * step + low
        is_negative = values[i] < 0
        codes[i] = np.uint8(level) | np.uint8(is_negative << (bits - 1))
        values[i] -= -sent if is_negative else sent
    return low, step


@jit
def add_entries(values, codes, scales, positions, chunk, kept, kept_of_rest, bits, share, out):
    """Add what is sent of each chunk, times ``share``."""
    _add_entries(*borrow(values, codes, scales, positions, out), chunk, kept, kept_of_rest, bits, share)


@jit_borrowed
def _add_entries(values, codes, scales, positions, out, chunk, kept, kept_of_rest, bits, share):
    real = out.dtype.type
    offset = 0
    for start in range(0, out.size, chunk):
        k = kept if out.size - start >= chunk else kept_of_rest
        if codes.size:
            sign, low, step = np.uint8(1 << (bits - 1)), scales[0, start // chunk], scales[1, start // chunk]
            for i in range(offset, offset + k):
                magnitude = real(codes[i] & (sign - np.uint8(1))) * step + low
                out[start + positions[i]] += (-magnitude if codes[i] & sign else magnitude) * share
        else:
            for i in range(offset, offset + k):
                out[start + positions[i]] += values[i] * share
        offset += k


@jit
def pack(codes, widths, packed):
    pack_planes(codes, widths, packed)


@jit
def unpack(packed, widths, codes):
    unpack_planes(packed, widths, codes)
