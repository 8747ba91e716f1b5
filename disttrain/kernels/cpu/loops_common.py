"""What the compiled loops of the CPU kernels share.

A block is processed in the first-level cache (``work``), so that memory traffic is no more than reading the gradient
and the residual and writing the new residual. Loops run from 0 over slices, since only then does the compiler know that
no index is negative, and vectorize. Each kernel passes its arrays to its loops through ``borrow``: numba would count
references to the slices of arrays that it owns.
"""

from __future__ import annotations

import numpy as np

from disttrain.kernels.cpu.compiling import compiled
from disttrain.kernels.cpu.intrinsics import from_bits, magnitude_bits

jit = compiled()
# Ignores NaN and -0 (finiteness is checked elsewhere), so that clamping is vectorized and still exact.
jit_finite = compiled(fastmath={"nnan", "nsz"})
jit_reordered = compiled(fastmath={"nnan", "nsz", "reassoc"})
jit_reassociated = compiled(fastmath={"reassoc"})
inline = compiled(inline="always")
# Inlined by LLVM, which then knows that references to borrowed arrays are not counted.
jit_borrowed = compiled(forceinline=True)


@inline
def load_block(grad, residual, start, work):
    """Write the entries from ``start`` on to ``work``, padded with zeros, and return how many there are."""
    size = min(work.size, grad.size - start)
    own = grad[start : start + size]
    if residual is None:
        for i in range(size):
            work[i] = own[i]
    else:
        added = residual[start : start + size]
        for i in range(size):
            work[i] = own[i] + added[i]
    if size < work.size:
        work[size:] = 0
    return size


@jit_finite
def _convert(own, scale, bound, added, work):
    for i in range(own.size):
        work[i] = min(max(own[i] / scale[i], -bound), bound) + added[i]


@inline
def load_converted_block(grad, scale, bound, residual, start, work):
    """``load_block`` of a gradient in other units: clamped quotients of ``grad`` and ``scale``."""
    if scale is None or residual is None:
        return load_block(grad, residual, start, work)
    size = min(work.size, grad.size - start)
    end = start + size
    _convert(grad[start:end], scale[start:end], bound, residual[start:end], work)
    if size < work.size:
        work[size:] = 0
    return size


@inline
def copy(source, target):
    for i in range(source.size):
        target[i] = source[i]


@inline
def mix(x):
    """MurmurHash3's finalizer."""
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(np.uint64(x) * np.uint64(0x85EBCA6B))
    x = np.uint32(x ^ (x >> np.uint32(13)))
    x = np.uint32(np.uint64(x) * np.uint64(0xC2B2AE35))
    return np.uint32(x ^ (x >> np.uint32(16)))


@jit
def largest_magnitude(work):
    """Return the largest magnitude; NaN if there is any."""
    largest = magnitude_bits(work.dtype.type(0))
    for i in range(work.size):
        largest = max(largest, magnitude_bits(work[i]))
    return from_bits(largest)


@inline
def store_mean(work, count, add, out):
    """Write, or add, ``work`` / ``count`` to ``out``."""
    if add and count == 1:
        for i in range(out.size):
            out[i] += work[i]
    elif add:
        for i in range(out.size):
            out[i] += work[i] / count
    else:
        for i in range(out.size):
            out[i] = work[i] / count


@inline
def store_mean_times(factors, work, count, add, out):
    """Write, or add, ``work`` / ``count`` times ``factors`` to ``out``."""
    if add:
        for i in range(out.size):
            out[i] += work[i] / count * factors[i]
    else:
        for i in range(out.size):
            out[i] = work[i] / count * factors[i]


@jit_reassociated
def _copy_and_sum_zeros(source, target):
    total = source.dtype.type(0)
    for i in range(source.size):
        target[i] = source[i]
        total += source[i] * source.dtype.type(0)  # NaN for an inf or a NaN, else 0
    return total


@jit
def copy_finite(source, target):
    return _copy_and_sum_zeros(source, target) == 0
