"""The compiled loops of whitening."""

from __future__ import annotations

import numpy as np

from disttrain.kernels.cpu.intrinsics import borrow
from disttrain.kernels.cpu.loops_common import jit, jit_borrowed, jit_finite, jit_reordered
from disttrain.kernels.sampling import ROW, ROW_STRIDE

_BLOCK = 4096  # entries whose squares are summed in the gradient's own precision


@jit_reordered
def _divide(values, scale, bound):
    """Divide and clamp in place; return the sum of squares before clamping."""
    total = values.dtype.type(0)
    for i in range(values.size):
        value = values[i] / scale[i]
        total += value * value
        values[i] = min(max(value, -bound), bound)
    return total


@jit_reordered
def _sum_of_squares(values, scale):
    total = values.dtype.type(0)
    for i in range(values.size):
        value = values[i] / scale[i]
        total += value * value
    return total


@jit
def whiten(grad, scale, sizes, bound, squares):
    _whiten(*borrow(grad, scale, sizes, squares), bound)


@jit_borrowed
def _whiten(grad, scale, sizes, squares, bound):
    start = 0
    for part in range(sizes.size):
        end, total = start + sizes[part], 0.0
        for first in range(start, end, _BLOCK):
            last = min(end, first + _BLOCK)
            total += np.float64(_divide(grad[first:last], scale[first:last], bound))
        squares[part] = total / max(1, sizes[part])
        start = end


@jit
def whitened_squares(grad, scale, sizes, squares):
    _whitened_squares(*borrow(grad, scale, sizes, squares))


@jit_borrowed
def _whitened_squares(grad, scale, sizes, squares):
    start = 0
    for part in range(sizes.size):
        size = sizes[part]
        stride = ROW
        end = start + size
        if size >= ROW * ROW_STRIDE:
            stride, end = ROW * ROW_STRIDE, start + size // ROW * ROW
        total, count = 0.0, 0
        for first in range(start, end, stride):
            last = min(end, first + ROW)
            total += np.float64(_sum_of_squares(grad[first:last], scale[first:last]))
            count += last - first
        squares[part] = total / max(1, count)
        start += size


@jit_finite
def hold_second_moment(scale, grad, out, eps, whole, share, decay):
    for i in range(scale.size):
        root = scale[i] - eps
        held = whole * root * root - share * grad[i] * grad[i]
        out[i] = max(held, scale.dtype.type(0)) / decay
