"""The compiled loops of sparsification."""

from __future__ import annotations

import numpy as np

from disttrain.kernels.cpu.intrinsics import LANES, add_and_compare, lowest_bit
from disttrain.kernels.cpu.loops_common import jit


@jit
def collect(grad, residual, total, threshold, indices, values):
    """Write ``grad + residual`` to ``total``, and the entries that reach the threshold, as far as they fit.

    Returns:
        The number of entries that reach the threshold.
    """
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


@jit
def sample(grad, residual, stride, sample):
    for run in range(sample.shape[0]):
        for i in range(sample.shape[1]):
            value = grad[run * stride + i]
            if residual is not None:
                value += residual[run * stride + i]
            sample[run, i] = abs(value)


@jit
def select(total, clear, indices, magnitude, kth, num_equal, values, chosen):
    """Take the entries of a magnitude above ``kth``, and the first ``num_equal`` of that magnitude."""
    count = 0
    for i in range(indices.size):
        if magnitude[i] > kth or (magnitude[i] == kth and num_equal > 0):
            if magnitude[i] == kth:
                num_equal -= 1
            index = indices[i]
            chosen[count] = index
            values[count] = total[index]
            if clear:
                total[index] = 0
            count += 1


@jit
def set_zero(total, indices):
    for i in range(indices.size):
        total[indices[i]] = 0


@jit
def scatter(values, indices, share, out):
    for i in range(values.size):
        out[indices[i]] += values[i] * share
