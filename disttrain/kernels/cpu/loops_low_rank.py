"""The compiled loops of PowerSGD: all matrices of a bucket in one call."""

from __future__ import annotations

import numpy as np

from disttrain.kernels.cpu.compiling import compiled
from disttrain.kernels.cpu.intrinsics import borrow, keep
from disttrain.kernels.cpu.loops_common import copy, inline, jit, jit_borrowed, jit_reordered, largest_magnitude

# May fuse multiplication and addition. Only for results that an all-reduce makes identical on all ranks afterwards.
_contracted = compiled(fastmath={"nnan", "nsz", "reassoc", "contract"})


@jit
def _fours(factor, rank, size):
    """Return a factor's rows in groups of four, (groups, 4, size), padded with zeros."""
    groups = (rank + 3) // 4
    filled = np.zeros(groups * 4 * size, factor.dtype)
    copy(factor[: rank * size], filled)
    return filled.reshape(groups, 4, size)


@_contracted
def _add_and_multiply(row, residual, q0, q1, q2, q3):
    """Add the residual, if any, to the row, and return the products of the row with four others."""
    p0 = p1 = p2 = p3 = row.dtype.type(0)
    for i in range(row.size):
        value = row[i]
        if residual is not None:
            value += residual[i]
            row[i] = value
        p0 += value * q0[i]
        p1 += value * q1[i]
        p2 += value * q2[i]
        p3 += value * q3[i]
    return p0, p1, p2, p3


@inline
def _add(residual, own):
    for i in range(own.size):
        own[i] += residual[i]


@jit
def project(total, residual, shapes, q, p):
    start = p_start = q_start = 0
    for rows, columns, rank in shapes:
        end, p_end = start + rows * columns, p_start + rank * rows
        right = _fours(q[q_start:], rank, columns)
        _project(*borrow(total[start:end], residual[start:end], right, p[p_start:p_end].reshape(rank, rows)))
        keep(right)
        start, p_start, q_start = end, p_end, q_start + rank * columns


@jit_borrowed
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


@jit_reordered
def _add_rows(r0, r1, r2, r3, f0, f1, f2, f3, out):
    for i in range(out.size):
        out[i] += f0 * r0[i] + f1 * r1[i] + f2 * r2[i] + f3 * r3[i]


@jit_reordered
def _add_row(row, factor, out):
    for i in range(out.size):
        out[i] += factor * row[i]


@jit
def project_back(total, residual, shapes, p, q):
    """``q`` must be zeros."""
    _project_back(*borrow(total, residual, shapes, p, q))


@jit_borrowed
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


@jit
def _residual_of_row(row, p0, p1, p2, p3, q0, q1, q2, q3, new_residual):
    for i in range(row.size):
        new_residual[i] = row[i] - (p0 * q0[i] + p1 * q1[i] + p2 * q2[i] + p3 * q3[i])


@jit
def _row_of_product(p0, p1, p2, p3, q0, q1, q2, q3, row):
    for i in range(row.size):
        row[i] = p0 * q0[i] + p1 * q1[i] + p2 * q2[i] + p3 * q3[i]


@jit
def low_rank_residual(total, shapes, p, q, mean_p, mean_q, new_residual):
    """For factors of up to four rows. Overwrites ``total`` with the product of the mean factors."""
    start = p_start = q_start = 0
    for rows, columns, rank in shapes:
        end = start + rows * columns
        left, mean_left = _fours(p[p_start:], rank, rows)[0], _fours(mean_p[p_start:], rank, rows)[0]
        right, mean_right = _fours(q[q_start:], rank, columns)[0], _fours(mean_q[q_start:], rank, columns)[0]
        _low_rank_residual(*borrow(total[start:end], left, right, mean_left, mean_right, new_residual[start:end]))
        keep(left, right, mean_left, mean_right)
        start, p_start, q_start = end, p_start + rank * rows, q_start + rank * columns


@jit_borrowed
def _low_rank_residual(total, left, right, mean_left, mean_right, new_residual):
    rows, columns = left.shape[1], right.shape[1]
    for row in range(rows):
        # Two loops are faster than one, since the compiler also unrolls loops over this few arrays.
        own, own_residual = (
            total[row * columns : (row + 1) * columns],
            new_residual[row * columns : (row + 1) * columns],
        )
        _residual_of_row(
            own, left[0, row], left[1, row], left[2, row], left[3, row],
            right[0], right[1], right[2], right[3], own_residual,
        )  # fmt: skip
        _row_of_product(
            mean_left[0, row], mean_left[1, row], mean_left[2, row], mean_left[3, row],
            mean_right[0], mean_right[1], mean_right[2], mean_right[3], own,
        )  # fmt: skip


_LANES = 16


@jit
def _steady_dot(a, b):
    """Return the dot product, with the same bits on every processor: partial sums in a fixed order.

    In float64, since rows as long as a vocabulary would be orthogonal only to three digits in float32.
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


@jit
def _scale(factor):
    largest = largest_magnitude(factor)
    if largest > 0:
        for i in range(factor.size):
            factor[i] /= largest


@jit
def scale(factor, sizes):
    start = 0
    for rank, size in sizes:
        _scale(factor[start : start + rank * size])
        start += rank * size


@jit
def _make_reflector(row):
    """Turn ``row`` into the vector that reflects it to the first axis; return 2 / |vector|^2, or 0 for zeros."""
    _scale(row)
    length = row.dtype.type(np.sqrt(_steady_dot(row, row)))
    row[0] += length if row[0] >= 0 else -length
    square = _steady_dot(row, row)
    return 2 / square if square > 0 else 0.0


@jit
def _reflect(reflector, strength, row):
    part = row.dtype.type(strength * _steady_dot(reflector, row))
    for i in range(row.size):
        row[i] -= part * reflector[i]


@jit
def orthogonalize(factor, sizes):
    """Use Householder reflections (Golub and Van Loan, 5.1 and 5.2), which rows of zeros do not disturb."""
    start = 0
    for rank, size in sizes:
        end = start + rank * size
        reflectors, strengths = factor[start:end], np.empty(rank)
        for k in range(rank):
            reflector = reflectors[k * size + k : (k + 1) * size]
            strengths[k] = _make_reflector(reflector)
            for j in range(k + 1, rank):
                _reflect(reflector, strengths[k], reflectors[j * size + k : (j + 1) * size])
        # Reflect the first unit vectors, from the last Householder vector to the first.
        spanning = np.zeros(rank * size, factor.dtype)
        for k in range(rank - 1, -1, -1):
            spanning[k * size + k] = 1
            reflector = reflectors[k * size + k : (k + 1) * size]
            for j in range(k, rank):
                _reflect(reflector, strengths[k], spanning[j * size + k : (j + 1) * size])
        copy(spanning, reflectors)
        start = end


@jit
def fill_zero_rows(factor, other, sizes):
    start = 0
    for rank, size in sizes:
        for _ in range(rank):
            row = factor[start : start + size]
            if not row.any():
                row[:] = other[start : start + size]
            start += size
