"""The compiled loops of PowerSGD, in the manner of those in ``loops``: all matrices of a bucket in one call."""

from __future__ import annotations

import numpy as np

from disttrain.kernels.cpu.compiling import compiled
from disttrain.kernels.cpu.intrinsics import borrow, keep
from disttrain.kernels.cpu.loops import _copy, _inline, _jit, _largest, _lent, _reordered

# Products and sums in one rounding where a processor can: for what an all-reduce makes alike on all ranks afterwards.
_contracted = compiled(fastmath={"nnan", "nsz", "reassoc", "contract"})


@_jit
def _fours(factor, rank, size):
    """(groups, 4, size): a factor's rows in groups of four, filled up with zeros."""
    groups = (rank + 3) // 4
    filled = np.zeros(groups * 4 * size, factor.dtype)
    _copy(factor[: rank * size], filled)
    return filled.reshape(groups, 4, size)


@_contracted
def _add_and_multiply(row, owed, q0, q1, q2, q3):
    """``row += owed``, unless that is None; the products of the row with four others."""
    p0 = p1 = p2 = p3 = row.dtype.type(0)
    for i in range(row.size):
        value = row[i]
        if owed is not None:
            value += owed[i]
            row[i] = value
        p0 += value * q0[i]
        p1 += value * q1[i]
        p2 += value * q2[i]
        p3 += value * q3[i]
    return p0, p1, p2, p3


@_inline
def _add(owed, own):
    for i in range(own.size):
        own[i] += owed[i]


@_jit
def project(total, residual, shapes, q, p):
    start = p_start = q_start = 0
    for rows, columns, rank in shapes:
        end, p_end = start + rows * columns, p_start + rank * rows
        right = _fours(q[q_start:], rank, columns)
        _project(*borrow(total[start:end], residual[start:end], right, p[p_start:p_end].reshape(rank, rows)))
        keep(right)
        start, p_start, q_start = end, p_end, q_start + rank * columns


@_lent
def _project(total, residual, right, left):
    (rank, rows), columns = left.shape, right.shape[2]
    for row in range(rows):
        start, end = row * columns, (row + 1) * columns
        own, first = total[start:end], right[0]
        products = _add_and_multiply(own, residual[start:end], first[0], first[1], first[2], first[3])
        for k in range(min(rank, 4)):
            left[k, row] = products[k]
        for group in range(1, len(right)):
            four = right[group]
            products = _add_and_multiply(own, None, four[0], four[1], four[2], four[3])
            for k in range(min(rank - 4 * group, 4)):
                left[4 * group + k, row] = products[k]


@_reordered
def _add_rows(r0, r1, r2, r3, f0, f1, f2, f3, out):
    for i in range(out.size):
        out[i] += f0 * r0[i] + f1 * r1[i] + f2 * r2[i] + f3 * r3[i]


@_reordered
def _add_row(row, factor, out):
    for i in range(out.size):
        out[i] += factor * row[i]


@_jit
def project_back(total, residual, shapes, p, q):
    """``q`` comes as zeros."""
    _project_back(*borrow(total, residual, shapes, p, q))


@_lent
def _project_back(total, residual, shapes, p, q):
    start = p_start = q_start = 0
    for rows, columns, rank in shapes:
        matrix = total[start : start + rows * columns].reshape(rows, columns)
        left = p[p_start : p_start + rank * rows].reshape(rank, rows)
        right = q[q_start : q_start + rank * columns].reshape(rank, columns)
        for row in range(0, rows, 4):
            end = min(row + 4, rows)
            if residual is not None:
                _add(
                    residual[start + row * columns : start + end * columns],
                    total[start + row * columns : start + end * columns],
                )
            if end == row + 4:
                r0, r1, r2, r3 = matrix[row], matrix[row + 1], matrix[row + 2], matrix[row + 3]
                for k in range(rank):
                    _add_rows(
                        r0, r1, r2, r3, left[k, row], left[k, row + 1], left[k, row + 2], left[k, row + 3], right[k]
                    )
            else:
                for last in range(row, end):
                    for k in range(rank):
                        _add_row(matrix[last], left[k, last], right[k])
        start += rows * columns
        p_start += rank * rows
        q_start += rank * columns


@_jit
def _rest_of_row(row, p0, p1, p2, p3, q0, q1, q2, q3, rest):
    for i in range(row.size):
        rest[i] = row[i] - (p0 * q0[i] + p1 * q1[i] + p2 * q2[i] + p3 * q3[i])


@_jit
def _row_of_product(p0, p1, p2, p3, q0, q1, q2, q3, row):
    for i in range(row.size):
        row[i] = p0 * q0[i] + p1 * q1[i] + p2 * q2[i] + p3 * q3[i]


@_jit
def low_rank_rest(total, shapes, p, q, mean_p, mean_q, rest):
    """For factors of up to four rows. The mean takes the place of ``total``."""
    start = p_start = q_start = 0
    for rows, columns, rank in shapes:
        end = start + rows * columns
        left, mean_left = _fours(p[p_start:], rank, rows)[0], _fours(mean_p[p_start:], rank, rows)[0]
        right, mean_right = _fours(q[q_start:], rank, columns)[0], _fours(mean_q[q_start:], rank, columns)[0]
        _low_rank_rest(*borrow(total[start:end], left, right, mean_left, mean_right, rest[start:end]))
        keep(left, right, mean_left, mean_right)
        start, p_start, q_start = end, p_start + rank * rows, q_start + rank * columns


@_lent
def _low_rank_rest(total, left, right, mean_left, mean_right, rest):
    rows, columns = left.shape[1], right.shape[1]
    for row in range(rows):
        # One after the other: loops with so few arrays the compiler unrolls too, and they are faster than one.
        own, own_rest = total[row * columns : (row + 1) * columns], rest[row * columns : (row + 1) * columns]
        _rest_of_row(
            own, left[0, row], left[1, row], left[2, row], left[3, row],
            right[0], right[1], right[2], right[3], own_rest,
        )  # fmt: skip
        _row_of_product(
            mean_left[0, row], mean_left[1, row], mean_left[2, row], mean_left[3, row],
            mean_right[0], mean_right[1], mean_right[2], mean_right[3], own,
        )  # fmt: skip


_LANES = 16


@_jit
def _steady_dot(a, b):
    """The same bits on every processor, whatever SIMD lanes it has: partial sums in an order that is written down.

    In float64, or rows as long as a vocabulary would be orthogonal to three digits only.
    """
    partial = np.zeros(_LANES)
    whole = a.size // _LANES * _LANES
    for start in range(0, whole, _LANES):
        left, right = a[start : start + _LANES], b[start : start + _LANES]
        for i in range(_LANES):
            partial[i] += np.float64(left[i]) * np.float64(right[i])
    total = 0.0
    for i in range(_LANES):
        total += partial[i]
    for i in range(whole, a.size):
        total += np.float64(a[i]) * np.float64(b[i])
    return total


@_jit
def _scale(factor):
    largest = _largest(factor)
    if largest > 0:
        for i in range(factor.size):
            factor[i] /= largest


@_jit
def scale(factor, sizes):
    start = 0
    for rank, size in sizes:
        _scale(factor[start : start + rank * size])
        start += rank * size


@_jit
def _make_mirror(row):
    """``row`` becomes the mirror that reflects it into the first axis; 2 / |mirror|^2, or 0 if there is nothing."""
    _scale(row)
    length = row.dtype.type(np.sqrt(_steady_dot(row, row)))
    row[0] += length if row[0] >= 0 else -length
    square = _steady_dot(row, row)
    return 2 / square if square > 0 else 0.0


@_jit
def _reflect(mirror, strength, row):
    part = row.dtype.type(strength * _steady_dot(mirror, row))
    for i in range(row.size):
        row[i] -= part * mirror[i]


@_jit
def orthogonalize(factor, sizes):
    """By Householder's reflections (Golub and Van Loan, 5.1 and 5.2), to which a row of zeros does no harm."""
    start = 0
    for rank, size in sizes:
        end = start + rank * size
        mirrors, strengths = factor[start:end], np.empty(rank)
        for k in range(rank):
            mirror = mirrors[k * size + k : (k + 1) * size]
            strengths[k] = _make_mirror(mirror)
            for j in range(k + 1, rank):
                _reflect(mirror, strengths[k], mirrors[j * size + k : (j + 1) * size])
        # The reflections of the first unit vectors, from the last mirror to the first.
        spanning = np.zeros(rank * size, factor.dtype)
        for k in range(rank - 1, -1, -1):
            spanning[k * size + k] = 1
            mirror = mirrors[k * size + k : (k + 1) * size]
            for j in range(k, rank):
                _reflect(mirror, strengths[k], spanning[j * size + k : (j + 1) * size])
        _copy(spanning, mirrors)
        start = end


@_jit
def fill_zero_rows(factor, other, sizes):
    start = 0
    for rank, size in sizes:
        for _ in range(rank):
            row = factor[start : start + size]
            if not row.any():
                row[:] = other[start : start + size]
            start += size
