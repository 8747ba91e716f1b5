"""The compiled loops of sparsification, in the manner of those in ``loops``."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from disttrain.kernels.loops import _jit

_LANES = 16


@intrinsic
def _add_and_compare(typing_context, grad, residual, total, start, threshold):
    """``total = grad + residual`` for 16 entries from ``start`` on; a bit for each that reaches the threshold.

    Written in LLVM's vectors, since it does not vectorize a loop with a branch, which takes up to twice as long.
    """

    def generate(context, builder, signature, arguments):
        real = context.get_value_type(grad.dtype)
        size = context.get_abi_sizeof(real)
        vector = ir.VectorType(real, _LANES)

        def pointer(array_type, value):
            data = context.make_array(array_type)(context, builder, value=value).data
            return builder.bitcast(builder.gep(data, [arguments[3]]), vector.as_pointer())

        values = builder.load(pointer(grad, arguments[0]), align=size)
        if residual is not types.none:
            values = builder.fadd(values, builder.load(pointer(residual, arguments[1]), align=size))
        builder.store(values, pointer(total, arguments[2]), align=size)
        nothing, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        every = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
        bound = builder.shuffle_vector(builder.insert_element(nothing, arguments[4], first), nothing, every)
        above, below = (
            builder.fcmp_ordered(*pair) for pair in ((">=", values, bound), ("<=", values, builder.fneg(bound)))
        )
        return builder.zext(builder.bitcast(builder.or_(above, below), ir.IntType(_LANES)), ir.IntType(64))

    return types.uint64(grad, residual, total, start, threshold), generate


@intrinsic
def _lowest_bit(typing_context, bits):
    """The place of the lowest bit that is set; one is."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(bits), generate


@_jit
def collect(grad, residual, total, threshold, indices, values):
    """``total = grad + residual``; all that reach the threshold, as far as they fit; how many there are."""
    count, capacity = 0, indices.size
    whole = grad.size // _LANES * _LANES
    for start in range(0, whole, _LANES):
        found = _add_and_compare(grad, residual, total, start, threshold)
        while found:
            if count < capacity:
                i = start + np.int64(_lowest_bit(found))
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
