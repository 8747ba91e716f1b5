"""LLVM instructions that compiled loops need and numba does not offer.

Numba's cache ignores changes to this file: touch the loops after a change (or ``make clean``).
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

LANES = 16  # entries that ``add_and_compare`` processes at once


@intrinsic
def borrow(typing_context, *given):
    """Return the arguments as a tuple, in which arrays are borrowed: their references are not counted.

    Numba counts a reference for each slice, by two atomic operations that together take longer than the arithmetic on a
    block. Slices of borrowed arrays are not counted. An array that is no argument of the calling function must be kept
    alive by ``keep``.
    """
    if not all(isinstance(argument, (types.Array, types.Number, types.Boolean, types.NoneType)) for argument in given):
        raise TypingError(f"only arrays, numbers and None can be borrowed, not {given}")

    def generate(context, builder, signature, arguments):
        borrowed = []
        for number, argument in enumerate(given):
            value = builder.extract_value(arguments[0], number)
            if isinstance(argument, types.Array):
                array = context.make_array(argument)(context, builder, value=value)
                array.meminfo = ir.Constant(array.meminfo.type, None)
                array.parent = ir.Constant(array.parent.type, None)
                value = array._getvalue()
            borrowed.append(value)
        return context.make_tuple(builder, signature.return_type, borrowed)

    return types.Tuple(given)(types.StarArgTuple(given)), generate


@intrinsic
def keep(typing_context, *arrays):
    """Keep arrays alive: numba frees an array after the last line that names it."""

    def generate(context, builder, signature, arguments):
        return context.get_dummy_value()

    return types.void(types.StarArgTuple(arrays)), generate


@intrinsic
def magnitude_bits(typing_context, number):
    """Return the bits of ``abs(number)`` as an integer of the same size. These are ordered as magnitudes, NaN last.

    LLVM vectorizes the search for the largest integer, but not for the largest float, because of NaN.
    """
    integer = types.int32 if number.bitwidth == 32 else types.int64

    def generate(context, builder, signature, arguments):
        bits = ir.IntType(number.bitwidth)
        without_sign = ir.Constant(bits, 2 ** (number.bitwidth - 1) - 1)
        return builder.and_(builder.bitcast(arguments[0], bits), without_sign)

    return integer(number), generate


@intrinsic
def from_bits(typing_context, bits):
    """Return the float with these bits."""
    real = types.float32 if bits.bitwidth == 32 else types.float64

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(real))

    return real(bits), generate


@intrinsic
def halfway(typing_context, low, high):
    """Return the number whose bits are the mean of those of two positive numbers of one type, rounded down.

    It is ``low`` if there is no number between them, so that a bisection ends after as many steps as a number has bits.
    """

    def generate(context, builder, signature, arguments):
        bits = ir.IntType(low.bitwidth)
        total = builder.add(*(builder.bitcast(argument, bits) for argument in arguments))
        return builder.bitcast(builder.lshr(total, ir.Constant(bits, 1)), context.get_value_type(low))

    return low(low, low), generate


@intrinsic
def round_to_bfloat16(typing_context, number):
    """Round to the nearest number of bfloat16, ties to even, and at most to its largest; by way of float32."""

    def generate(context, builder, signature, arguments):
        bits, single = ir.IntType(32), ir.FloatType()
        narrow = arguments[0] if number.bitwidth == 32 else builder.fptrunc(arguments[0], single)
        magnitude = builder.and_(builder.bitcast(narrow, bits), ir.Constant(bits, 0x7FFFFFFF))
        sign = builder.and_(builder.bitcast(narrow, bits), ir.Constant(bits, 0x80000000))
        odd = builder.and_(builder.lshr(magnitude, ir.Constant(bits, 16)), ir.Constant(bits, 1))
        rounded = builder.add(magnitude, builder.add(odd, ir.Constant(bits, 0x7FFF)))
        rounded = builder.and_(rounded, ir.Constant(bits, 0xFFFF0000))
        largest = ir.Constant(bits, 0x7F7F0000)
        rounded = builder.select(builder.icmp_unsigned("<", rounded, largest), rounded, largest)
        result = builder.bitcast(builder.or_(rounded, sign), single)
        return result if number.bitwidth == 32 else builder.fpext(result, context.get_value_type(number))

    return number(number), generate


@intrinsic
def add_and_compare(typing_context, grad, residual, total, start, threshold):
    """Write ``grad + residual`` to ``total`` for 16 entries from ``start`` on.

    Uses LLVM's vectors, since LLVM does not vectorize a loop with a branch, which takes up to twice as long.

    Returns:
        A bit mask of the entries that reach the threshold.
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
    """Return the position of the lowest set bit. At least one must be set."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(bits), generate
