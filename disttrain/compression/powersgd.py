"""PowerSGD: one step of power iteration gives a low-rank factor pair (Vogels et al. 2019, arXiv:1905.13727)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from disttrain.collectives import AllReduce
from disttrain.compression.base import Bucket, Compressor, Program, State, matrix_shape, seeded_generator
from disttrain.compression.ramp import RankRamp
from disttrain.errors import UserError
from disttrain.kernels import for_device


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
    rank_ramp: RankRamp | None = Field(default=None, description="start and steps of a way to `rank`")
    min_compression: float = Field(
        2.0, ge=1, description="matrices whose factors would not be this much smaller go dense"
    )
    alternating: bool = Field(default=False, description="send one factor a step, in turn: half the bytes and rounds")
    seed: int = Field(default=0, description="of the first Q, equal on all ranks")

    def accepts(self, shape: Sequence[int]) -> bool:
        rows, columns = matrix_shape(shape)
        factors = min(self._largest_rank, rows, columns) * (rows + columns)
        return super().accepts(shape) and factors * self.min_compression <= rows * columns

    def check(self, shapes: Sequence[Sequence[int]]) -> None:
        sides = [min(matrix_shape(shape)) for shape in shapes if super(PowerSGD, self).accepts(shape)]
        if sides and self.rank > max(sides):
            raise UserError(
                f"powersgd: rank={self.rank} is more than any matrix has rows or columns, the most being {max(sides)}: "
                "nothing would be compressed, lower it"
            )

    def init_state(self, bucket: Bucket) -> State:
        state = State()
        state.add_zeros("residual", bucket)
        shapes = self._shapes(bucket, self._largest_rank)
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
        kernels = for_device(grad.device)
        rank = self.rank if self.rank_ramp is None else self.rank_ramp.at(state.step, self.rank)
        shapes = self._shapes(bucket, rank)
        p_shapes = [(rank, rows) for rows, _, rank in shapes]
        q_shapes = [(rank, columns) for _, columns, rank in shapes]
        kept_shapes = self._shapes(bucket, self._largest_rank)
        kept_qs = _split(state.q, [(rank, columns) for _, columns, rank in kept_shapes])
        kept_ps = _split(state.p, [(rank, rows) for rows, _, rank in kept_shapes]) if self.alternating else []
        sends_p = not self.alternating or state.step % 2 == 0
        sends_q = not self.alternating or not sends_p
        rest = state.scratch("residual")
        new = {"residual": rest}
        matrices, residuals, totals = (bucket.matrices(flat) for flat in (grad, state.residual, rest))
        owed = list(zip(matrices, residuals, totals, strict=True))

        if sends_p:
            old_qs = _first(kept_qs, q_shapes)
            own_qs = mean_qs = [_orthogonal(q) if self.alternating else _scaled(q) for q in old_qs]
            own_ps = [kernels.project(*each, q) for each, q in zip(owed, own_qs, strict=True)]
            mean_ps = _split((yield AllReduce(_join(own_ps), op="mean")), p_shapes)
        else:
            for each in owed:
                kernels.add(*each)
            mean_ps = _first(kept_ps, p_shapes)
        if self.alternating and sends_p:
            new["p"] = _kept(mean_ps, kept_ps)
        if sends_q:
            own_ps = mean_ps = [_orthogonal(p) for p in mean_ps]
            own_qs = [kernels.project_back(total, p) for total, p in zip(totals, own_ps, strict=True)]
            mean_qs = _split((yield AllReduce(_join(own_qs), op="mean")), q_shapes)
            new["q"] = _kept(mean_qs, kept_qs)

        for total, out, *own, mean_p, mean_q in zip(totals, matrices, own_ps, own_qs, mean_ps, mean_qs, strict=True):
            kernels.low_rank_rest(total, (own[0], own[1]), (mean_p, mean_q), out)
        return grad, new

    @property
    def _largest_rank(self) -> int:
        return self.rank if self.rank_ramp is None else max(self.rank, self.rank_ramp.start)

    def _shapes(self, bucket: Bucket, rank: int) -> list[tuple[int, int, int]]:
        """(rows, columns, rank of the factors) of every matrix."""
        return [(rows, columns, min(rank, rows, columns)) for rows, columns in bucket.matrix_shapes]


# Factors lie as (rank, rows or columns): the kernels run along rows of the matrix.


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _split(flat: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    parts = flat.split([rank * size for rank, size in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _first(kept: Sequence[torch.Tensor], shapes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Of factors that are kept at their largest rank, what this step's rank uses."""
    return [factor[:rank] for factor, (rank, _) in zip(kept, shapes, strict=True)]


def _kept(new: Sequence[torch.Tensor], old: Sequence[torch.Tensor]) -> torch.Tensor:
    """A direction without any gradient would be zero for ever: it stays what it was. So do those not used now."""
    parts = []
    for factor, kept in zip(new, old, strict=True):
        before, unused = kept[: len(factor)], kept[len(factor) :]
        parts += [torch.where((factor == 0).all(1, keepdim=True), before, factor), unused]
    return _join(parts)


def _orthogonal(factor: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows that span those of ``factor`` (rank, size), also where these are zero or dependent."""
    orthonormal: torch.Tensor = torch.linalg.qr(_scaled(factor).T).Q.T.contiguous()
    return orthonormal


def _scaled(matrix: torch.Tensor) -> torch.Tensor:
    """The same directions at a size of one, so that products of huge or tiny gradients neither overflow nor vanish."""
    largest = matrix.abs().amax()
    return matrix / torch.where(largest > 0, largest, 1.0)
