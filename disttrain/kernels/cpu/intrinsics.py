"""What compiled loops need and numba does not have, in LLVM's terms.

Numba's cache does not look at this file: after a change to it, touch the loops (or ``make clean``).
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

LANES = 16  # entries that ``add_and_compare`` takes at once


@intrinsic
def borrow(typing_context, *given):
    """The same arguments as a tuple, but the arrays among them without a share in their ownership.

    Numba counts references: an atomic addition and another one back for each slice, which together take longer than
    the arithmetic on a block. Slices of what is borrowed are not counted. Its owner has to ``keep`` it meanwhile, or be
    an argument of the calling function.
    """
    if not all(isinstance(argument, (types.Array, types.Number, types.Boolean, types.NoneType)) for argument in given):
        raise TypingError(f"only arrays, numbers and None can be lent, not {given}: all else may be counted")

    def generate(context, builder, signature, arguments):
        lent = []
        for number, argument in enumerate(given):
            value = builder.extract_value(arguments[0], number)
            if isinstance(argument, types.Array):
                array = context.make_array(argument)(context, builder, value=value)
                array.meminfo = ir.Constant(array.meminfo.type, None)
                array.parent = ir.Constant(array.parent.type, None)
                value = array._getvalue()
            lent.append(value)
        return context.make_tuple(builder, signature.return_type, lent)

    return types.Tuple(given)(types.StarArgTuple(given)), generate


@intrinsic
def keep(typing_context, *arrays):
    """Nothing; but numba gives an array back after the last line that names it."""

    def generate(context, builder, signature, arguments):
        return context.get_dummy_value()

    return types.void(types.StarArgTuple(arrays)), generate


@intrinsic
def magnitude_bits(typing_context, number):
    """The bits of ``abs(number)`` as an integer of its size. These are ordered as magnitudes are, NaN above all.

    A largest integer is found in SIMD lanes. A largest float is not: LLVM wants to know of no NaN at every step.
    """
    integer = types.int32 if number.bitwidth == 32 else types.int64

    def generate(context, builder, signature, arguments):
        bits = ir.IntType(number.bitwidth)
        without_sign = ir.Constant(bits, 2 ** (number.bitwidth - 1) - 1)
        return builder.and_(builder.bitcast(arguments[0], bits), without_sign)

    return integer(number), generate


@intrinsic
def from_bits(typing_context, bits):
    """The float of these bits."""
    real = types.float32 if bits.bitwidth == 32 else types.float64

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(real))

    return real(bits), generate


@intrinsic
def add_and_compare(typing_context, grad, residual, total, start, threshold):
    """``total = grad + residual`` for 16 entries from ``start`` on; a bit for each that reaches the threshold.

    Written in LLVM's vectors, since it does not vectorize a loop with a branch, which takes up to twice as long.
    """

    def generate(context, builder, signature, arguments):
        real = context.get_value_type(grad.dtype)
        size = context.get_abi_sizeof(real)
        vector = ir.VectorType(real, LANES)

        def pointer(array_type, value):
            data = context.make_array(array_type)(context, builder, value=value).data
            return builder.bitcast(builder.gep(data, [arguments[3]]), vector.as_pointer())

        values = builder.load(pointer(grad, arguments[0]), align=size)
        if residual is not types.none:
            values = builder.fadd(values, builder.load(pointer(residual, arguments[1]), align=size))
        builder.store(values, pointer(total, arguments[2]), align=size)
        nothing, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        every = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        bound = builder.shuffle_vector(builder.insert_element(nothing, arguments[4], first), nothing, every)
        above, below = (
            builder.fcmp_ordered(*pair) for pair in ((">=", values, bound), ("<=", values, builder.fneg(bound)))
        )
        return builder.zext(builder.bitcast(builder.or_(above, below), ir.IntType(LANES)), ir.IntType(64))

    return types.uint64(grad, residual, total, start, threshold), generate


@intrinsic
def lowest_bit(typing_context, bits):
    """The place of the lowest bit that is set; one is."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(bits), generate
