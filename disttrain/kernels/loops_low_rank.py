"""The compiled loops of PowerSGD, in the manner of those in ``loops``."""

from __future__ import annotations

from disttrain.kernels.loops import _jit, _load, _reordered


@_reordered
def _dot(row, factor):
    total = row.dtype.type(0)
    for i in range(row.size):
        total += row[i] * factor[i]
    return total


@_jit
def project(grad, residual, total, q, p):
    for row in range(grad.shape[0]):
        _load(grad[row], None if residual is None else residual[row], 0, total[row])
        for k in range(q.shape[0]):
            p[k, row] = _dot(total[row], q[k])


@_reordered
def _add_rows(r0, r1, r2, r3, f0, f1, f2, f3, out):
    for i in range(out.size):
        out[i] += f0 * r0[i] + f1 * r1[i] + f2 * r2[i] + f3 * r3[i]


@_reordered
def _add_row(row, factor, out):
    for i in range(out.size):
        out[i] += factor * row[i]


@_jit
def project_back(total, p, q):
    rows = total.shape[0]
    for row in range(0, rows - 3, 4):
        r0, r1, r2, r3 = total[row], total[row + 1], total[row + 2], total[row + 3]
        for k in range(q.shape[0]):
            _add_rows(r0, r1, r2, r3, p[k, row], p[k, row + 1], p[k, row + 2], p[k, row + 3], q[k])
    for row in range(rows // 4 * 4, rows):
        for k in range(q.shape[0]):
            _add_row(total[row], p[k, row], q[k])


@_reordered
def _low_rank_row(left, out, p0, p1, p2, p3, q0, q1, q2, q3, mp0, mp1, mp2, mp3, mq0, mq1, mq2, mq3):
    for i in range(left.size):
        left[i] -= p0 * q0[i] + p1 * q1[i] + p2 * q2[i] + p3 * q3[i]
        out[i] = mp0 * mq0[i] + mp1 * mq1[i] + mp2 * mq2[i] + mp3 * mq3[i]


@_jit
def low_rank_rest(total, p, q, mean_p, mean_q, out):
    """For factors of four rows; those of fewer come filled up with zeros."""
    q0, q1, q2, q3, mq0, mq1, mq2, mq3 = q[0], q[1], q[2], q[3], mean_q[0], mean_q[1], mean_q[2], mean_q[3]
    for row in range(total.shape[0]):
        p0, p1, p2, p3 = p[0, row], p[1, row], p[2, row], p[3, row]
        mp0, mp1, mp2, mp3 = mean_p[0, row], mean_p[1, row], mean_p[2, row], mean_p[3, row]
        _low_rank_row(total[row], out[row], p0, p1, p2, p3, q0, q1, q2, q3, mp0, mp1, mp2, mp3, mq0, mq1, mq2, mq3)
