"""The compiled loops of sparsification, in the manner of those in ``loops``."""

from __future__ import annotations

import numpy as np

from disttrain.kernels.cpu.intrinsics import LANES, add_and_compare, lowest_bit
from disttrain.kernels.cpu.loops import _jit


@_jit
def collect(grad, residual, total, threshold, indices, values):
    """``total = grad + residual``; all that reach the threshold, as far as they fit; how many there are."""
    count, capacity = 0, indices.size
    whole = grad.size // LANES * LANES
    for start in range(0, whole, LANES):
        found = add_and_compare(grad, residual, total, start, threshold)
        while found:
            if count < capacity:
                i = start + np.int64(lowest_bit(found))
                indices[count] = i
                values[count] = total[i]
            count += 1
            found &= found - np.uint64(1)
    for i in range(whole, grad.size):
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
