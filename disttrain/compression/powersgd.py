"""PowerSGD: one step of power iteration gives a low-rank factor pair (Vogels et al. 2019, arXiv:1905.13727)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from disttrain.collectives import AllReduce
from disttrain.compression.base import Bucket, Compressor, Program, State, matrix_shape, seeded_generator


class PowerSGD(Compressor):
    """Send rank-r factors P (n, r) and Q (m, r) of every (n, m) gradient matrix instead of its n m entries.

    Linear, so both factors are all-reduced and the cost does not grow with the number of workers: 4 r (n + m) bytes.
    Biased, so what was not sent is always added to the next gradient. Q is kept, each step goes on from the last one's.

    Differs from the paper's code in the residual, which is taken against this rank's own Q (as in its authors' later
    library): the mean over ranks is the same, and telescoping then holds on every rank.

    ``alternating`` is ACP-SGD (Zhang et al. 2023): even steps send P = M orth(Q), odd steps Q = M^T orth(P). Half the
    bytes, and one all-reduce a step, which can start as soon as the gradient is there.
    """

    name = "powersgd"

    rank: int = Field(default=4, ge=1, description="columns of each factor; more is more exact and sends more")
    min_compression: float = Field(
        2.0, ge=1, description="matrices whose factors would not be this much smaller go dense"
    )
    alternating: bool = Field(default=False, description="send one factor a step, in turn: half the bytes and rounds")
    seed: int = Field(default=0, description="of the first Q, equal on all ranks")

    def accepts(self, shape: Sequence[int]) -> bool:
        rows, columns = matrix_shape(shape)
        factors = min(self.rank, rows, columns) * (rows + columns)
        return super().accepts(shape) and factors * self.min_compression <= rows * columns

    def init_state(self, bucket: Bucket) -> State:
        state = State()
        residual = torch.zeros(bucket.numel, dtype=bucket.dtype, device=bucket.device)
        state.add("residual", residual, bucket.numels, replicated=False)
        shapes = self._shapes(bucket)
        self._add_factor(state, "q", [columns * rank for _, columns, rank in shapes], bucket)
        if self.alternating:
            self._add_factor(state, "p", [rows * rank for rows, _, rank in shapes], bucket)
        return state

    def _add_factor(self, state: State, factor: str, sizes: list[int], bucket: Bucket) -> None:
        # Keyed by the parameter's name: the same factor however parameters are grouped into buckets.
        parts = []
        for size, name in zip(sizes, bucket.names, strict=True):
            generator = seeded_generator(
                bucket.device, (self.seed, name) if factor == "q" else (self.seed, name, factor)
            )
            parts.append(torch.randn(size, generator=generator, dtype=bucket.dtype, device=bucket.device))
        state.add(factor, torch.cat(parts), sizes, replicated=True)

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        if self.alternating:
            return (yield from self._alternate(grad, bucket, state))
        matrices = bucket.matrices(grad.add_(state.residual))
        shapes = self._shapes(bucket)
        old_qs = _split(state.q, [(columns, rank) for _, columns, rank in shapes])

        joined = _join([matrix @ _scaled(q) for matrix, q in zip(matrices, old_qs, strict=True)])
        joined = yield AllReduce(joined, op="mean")
        ps = [_orthogonal(p) for p in _split(joined, [(rows, rank) for rows, _, rank in shapes])]

        qs = [matrix.T @ p for matrix, p in zip(matrices, ps, strict=True)]
        for matrix, p, q in zip(matrices, ps, qs, strict=True):
            matrix.addmm_(p, q.T, alpha=-1)  # what stays in ``grad`` is the residual
        joined = yield AllReduce(_join(qs), op="mean")
        qs = _split(joined, [(columns, rank) for _, columns, rank in shapes])

        mean = torch.empty_like(grad)
        for out, p, q in zip(bucket.matrices(mean), ps, qs, strict=True):
            torch.mm(p, q.T, out=out)
        return mean, {"residual": grad, "q": _join(_kept(qs, old_qs))}

    def _alternate(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        is_even = state.step % 2 == 0

        def facing(flat: torch.Tensor) -> list[torch.Tensor]:
            """Odd steps are even ones on the transposed matrices."""
            return [matrix if is_even else matrix.T for matrix in bucket.matrices(flat)]

        row_shapes = [(rows, rank) for rows, _, rank in self._shapes(bucket)]
        column_shapes = [(columns, rank) for _, columns, rank in self._shapes(bucket)]
        moving, moving_shapes, fixed_shapes = "p", row_shapes, column_shapes
        if not is_even:
            moving, moving_shapes, fixed_shapes = "q", column_shapes, row_shapes
        bases = [_orthogonal(factor) for factor in _split(state.q if is_even else state.p, fixed_shapes)]

        matrices = facing(grad.add_(state.residual))
        factors = [matrix @ basis for matrix, basis in zip(matrices, bases, strict=True)]
        for matrix, factor, basis in zip(matrices, factors, bases, strict=True):
            matrix.addmm_(factor, basis.T, alpha=-1)
        joined = yield AllReduce(_join(factors), op="mean")
        factors = _split(joined, moving_shapes)

        mean = torch.empty_like(grad)
        for out, factor, basis in zip(facing(mean), factors, bases, strict=True):
            out.copy_(factor @ basis.T)
        old = _split(state.p if is_even else state.q, moving_shapes)
        return mean, {"residual": grad, moving: _join(_kept(factors, old))}

    def _shapes(self, bucket: Bucket) -> list[tuple[int, int, int]]:
        """(rows, columns, rank of the factors) of every matrix."""
        return [(rows, columns, min(self.rank, rows, columns)) for rows, columns in bucket.matrix_shapes]


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _split(flat: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    parts = flat.split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _kept(new: Sequence[torch.Tensor], old: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A column without any gradient would be zero for ever: it keeps the direction it had."""
    return [torch.where((factor == 0).all(0), before, factor) for factor, before in zip(new, old, strict=True)]


def _orthogonal(p: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span those of ``p`` (rows, rank), also where these are zero or dependent."""
    orthonormal: torch.Tensor = torch.linalg.qr(_scaled(p)).Q
    return orthonormal


def _scaled(matrix: torch.Tensor) -> torch.Tensor:
    """The same directions at a size of one, so that products of huge or tiny gradients neither overflow nor vanish."""
    largest = matrix.abs().amax()
    return matrix / torch.where(largest > 0, largest, 1.0)
