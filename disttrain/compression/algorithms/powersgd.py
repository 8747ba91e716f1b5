"""PowerSGD: one step of power iteration gives a low-rank factor pair (Vogels et al. 2019, arXiv:1905.13727)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from disttrain.collectives import AllReduce
from disttrain.compression.base import Bucket, Compressor, Program, State, matrix_shape, seeded_generator
from disttrain.compression.ramp import RankRamp
from disttrain.errors import UserError
from disttrain.kernels import Kernels, for_device
from disttrain.kernels.factors import Sizes, join_factor, p_sizes, q_sizes, split_factor


class PowerSGD(Compressor):
    """Send rank-r factors P (n, r) and Q (m, r) of every (n, m) gradient matrix instead of its n m entries.

    Linear, so both factors are all-reduced and the cost does not grow with the number of workers: 4 r (n + m) bytes.
    Biased, so error feedback is always on. Each step continues from the Q of the last one.

    Differs from the paper's code in the residual, which uses this rank's own Q (as in the authors' later library). The
    mean over ranks is the same, and on every rank what was sent plus the residual is the sum of its gradients.

    ``alternating`` is ACP-SGD (Zhang et al. 2023): even steps send P = M orth(Q), odd steps Q = M^T orth(P). That is
    half the bytes and one all-reduce a step, which can start as soon as the gradient is there.
    """

    name = "powersgd"

    rank: int = Field(default=4, ge=1, description="columns of each factor; more is more exact and sends more")
    rank_ramp: RankRamp | None = Field(default=None, description="start and steps of a ramp to `rank`")
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
                f"powersgd: rank={self.rank} exceeds the rows or columns of every matrix (at most {max(sides)}), "
                "so nothing would be compressed: lower it"
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
        # Seeded by the parameter's name, so that factors do not depend on how parameters are grouped into buckets.
        parts = []
        for size, name in zip(sizes, bucket.names, strict=True):
            generator = seeded_generator(
                bucket.device, (self.seed, name) if factor == "q" else (self.seed, name, factor)
            )
            parts.append(torch.randn(size, generator=generator, dtype=bucket.dtype, device=bucket.device))
        state.add(factor, torch.cat(parts), sizes, replicated=True)

    def num_rounds(self, bucket: Bucket) -> int:
        return 1 if self.alternating else 2

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        kernels = for_device(grad.device)
        rank = self.rank if self.rank_ramp is None else self.rank_ramp.at(state.step, self.rank)
        shapes, kept_shapes = self._shapes(bucket, rank), self._shapes(bucket, self._largest_rank)
        new_residual = state.scratch("residual")
        new = {"residual": new_residual}
        is_p_turn = state.step % 2 == 0

        if not self.alternating or is_p_turn:
            own_q = _first(state.q, q_sizes(kept_shapes), q_sizes(shapes))
            own_q = (kernels.orthogonalize if self.alternating else kernels.scale_factor)(own_q, q_sizes(shapes))
            own_p = kernels.project(grad, state.residual, own_q, shapes)  # grad includes the residual from here on
            mean_p = yield AllReduce(own_p.clone(), op="mean")  # a copy, since it may be overwritten
        if self.alternating and is_p_turn:
            mean_q = own_q
            new["p"] = _kept(kernels, mean_p, state.p, p_sizes(shapes), p_sizes(kept_shapes))
        else:
            last_p = _first(state.p, p_sizes(kept_shapes), p_sizes(shapes)) if self.alternating else mean_p
            own_p = mean_p = kernels.orthogonalize(last_p, p_sizes(shapes))
            own_q = kernels.project_back(grad, state.residual if self.alternating else None, own_p, shapes)
            mean_q = yield AllReduce(own_q.clone(), op="mean")
            new["q"] = _kept(kernels, mean_q, state.q, q_sizes(shapes), q_sizes(kept_shapes))

        kernels.low_rank_residual(grad, (own_p, own_q), (mean_p, mean_q), new_residual, shapes)
        return grad, new

    @property
    def _largest_rank(self) -> int:
        return self.rank if self.rank_ramp is None else max(self.rank, self.rank_ramp.start)

    def _shapes(self, bucket: Bucket, rank: int) -> list[tuple[int, int, int]]:
        """(rows, columns, rank of the factors) of every matrix."""
        return [(rows, columns, min(rank, rows, columns)) for rows, columns in bucket.matrix_shapes]


def _first(kept: torch.Tensor, kept_sizes: Sizes, sizes: Sizes) -> torch.Tensor:
    """Return the rows of kept factors that a step of this rank uses; they are kept at their largest rank."""
    if sizes == kept_sizes:
        return kept
    parts = zip(split_factor(kept, kept_sizes), sizes, strict=True)
    return join_factor([factor[:rank] for factor, (rank, _) in parts])


def _kept(kernels: Kernels, new: torch.Tensor, old: torch.Tensor, sizes: Sizes, kept_sizes: Sizes) -> torch.Tensor:
    """Return the directions that the next step starts from.

    Zero directions keep their old values, as do those that this step does not use. Orthogonalizing zeros gives the
    first unit vectors. If these rows of the gradient are always zero, the next factor would be zero too, and stay so.
    """
    if sizes != kept_sizes:
        pairs = zip(split_factor(new, sizes), split_factor(old, kept_sizes), strict=True)
        new = join_factor([torch.cat([factor, kept[len(factor) :]]) for factor, kept in pairs])
    return kernels.fill_zero_rows(new, old, kept_sizes)
