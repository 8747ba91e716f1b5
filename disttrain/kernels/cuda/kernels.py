"""The kernels for GPUs, in Triton: few passes over memory.

This file turns tensors into launches; what runs is in ``tiles`` and ``tiles_low_rank``. What is missing here, and
widths or blocks that do not suit tiles, runs as the reference in torch on the GPU; so do PowerSGD's products, for which
cuBLAS is there. Results are the reference's (on a CPU) to the bit, but for sums, whose order is another, for what
follows from them, and for rests, of which the reference rounds some once less.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from disttrain.kernels.cuda import tiles, tiles_low_rank
from disttrain.kernels.reference import Kernels, Sizes, Tensor, num_blocks, search_for_largest

_MAGIC = {torch.float32: 1.5 * 2**23, torch.float64: 1.5 * 2**52}
_TILE = 1024  # entries that a program works on at a time, where no block says so
_EXACT = {"enable_fp_fusion": False}  # a product and a sum are rounded each, as torch does


class CudaKernels(Kernels):
    def take_largest(self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        search = search_for_largest(grad.numel(), k)
        if search is None:
            return super().take_largest(grad, residual, rest, k)
        share, capacity = search
        threshold = self.estimate_threshold(grad, residual, share)
        near, places, count = self._collect(grad, residual, rest, threshold, capacity, clear=False)
        if not k <= count <= capacity:
            total, owed = (grad, residual) if rest is None else (rest, None)
            return super().take_largest(total, owed, rest, k)
        values, chosen = super().take_largest(near[:count], None, None, k)
        indices = places[chosen.long()]
        if rest is not None:
            rest[indices.long()] = 0
        return values, indices

    def take_above(
        self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, threshold: float, capacity: int
    ) -> tuple[Tensor, Tensor, int]:
        return self._collect(grad, residual, rest, threshold, capacity, clear=rest is not None)

    def _collect(
        self,
        grad: Tensor,
        residual: Tensor | None,
        rest: Tensor | None,
        threshold: float,
        capacity: int,
        *,
        clear: bool,
    ) -> tuple[Tensor, Tensor, int]:
        """``take_above``, which takes out of ``rest`` what it found only if told to.

        Every tile counts what it has, so that each knows where its own begin: rising order, without any atomics.
        """
        values, indices = grad.new_zeros(capacity), torch.zeros(capacity, dtype=torch.int32, device=grad.device)
        num_tiles = num_blocks(grad.numel(), _TILE)
        counts = torch.empty(num_tiles, dtype=torch.int32, device=grad.device)
        bound = torch.full((1,), threshold, dtype=grad.dtype, device=grad.device)
        tiles.count_above[(num_tiles,)](
            grad, grad if residual is None else residual, grad if rest is None else rest, bound, counts, grad.numel(),
            HAS_RESIDUAL=residual is not None, HAS_REST=rest is not None, TILE=_TILE, **_EXACT,
        )  # fmt: skip
        ends = counts.cumsum(0)
        total, owed = (grad, residual) if rest is None else (rest, None)
        tiles.write_above[(num_tiles,)](
            total, total if owed is None else owed, bound, ends - counts, values, indices, grad.numel(), capacity,
            HAS_RESIDUAL=owed is not None, CLEAR=clear, TILE=_TILE, **_EXACT,
        )  # fmt: skip
        return values, indices, int(ends[-1])

    def quantize(
        self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, bits: int, block: int, seed: int | None
    ) -> tuple[Tensor, Tensor]:
        if not _suits(bits, block):
            return super().quantize(grad, residual, rest, bits, block, seed)
        count = num_blocks(grad.numel(), block)
        codes = torch.empty(count * block * bits // 8, dtype=torch.uint8, device=grad.device)
        scales = torch.empty(count, dtype=grad.dtype, device=grad.device)
        tiles.quantize[(count,)](
            grad, grad if residual is None else residual, grad if rest is None else rest, codes, scales, grad.numel(),
            _signed(seed or 0), HAS_RESIDUAL=residual is not None, HAS_REST=rest is not None,
            AT_RANDOM=seed is not None, TINY=torch.finfo(grad.dtype).tiny, MAGIC=_MAGIC[grad.dtype],
            LEVELS=2 ** (bits - 1) - 1, BITS=bits, PLANES=8 // bits, LENGTH=block * bits // 8, **_EXACT,
        )  # fmt: skip
        return codes, scales

    def dequantize_mean(
        self,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor],
        bits: int,
        block: int,
        out: Tensor,
        *,
        add: bool = False,
    ) -> None:
        if not _suits(bits, block):
            super().dequantize_mean(codes, scales, bits, block, out, add=add)
            return
        count = scales[0].numel()
        tiles.dequantize[(count,)](
            torch.stack(list(codes)), torch.stack(list(scales)), out, out.numel(), len(codes), count,
            ADD=add, LEVELS=2 ** (bits - 1) - 1, BITS=bits, PLANES=8 // bits, LENGTH=block * bits // 8, **_EXACT,
        )  # fmt: skip

    def sign(self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
        if not _suits(1, block):
            return super().sign(grad, residual, rest, block)
        count = num_blocks(grad.numel(), block)
        bits = torch.empty(count * block // 8, dtype=torch.uint8, device=grad.device)
        scales = torch.empty(count, dtype=grad.dtype, device=grad.device)
        tiles.sign[(count,)](
            grad, grad if residual is None else residual, grad if rest is None else rest, bits, scales, grad.numel(),
            HAS_RESIDUAL=residual is not None, HAS_REST=rest is not None, LENGTH=block // 8, **_EXACT,
        )  # fmt: skip
        return bits, scales

    def sign_mean(
        self, bits: Sequence[Tensor], scales: Sequence[Tensor], block: int, out: Tensor, *, add: bool = False
    ) -> None:
        if not _suits(1, block):
            super().sign_mean(bits, scales, block, out, add=add)
            return
        count = scales[0].numel()
        tiles.sign_mean[(count,)](
            torch.stack(list(bits)), torch.stack(list(scales)), out, out.numel(), len(bits), count,
            ADD=add, LENGTH=block // 8, **_EXACT,
        )  # fmt: skip

    def scale_factor(self, factor: Tensor, sizes: Sizes) -> Tensor:
        scaled = torch.empty_like(factor)
        tiles_low_rank.scale[(len(sizes),)](factor, scaled, _plan(tuple(sizes), factor.device), TILE=_TILE, **_EXACT)
        return scaled

    def orthogonalize(self, factor: Tensor, sizes: Sizes) -> Tensor:
        orthonormal = torch.zeros_like(factor)
        strengths = factor.new_empty(sum(rank for rank, _ in sizes), dtype=torch.float64)
        plan = _plan(tuple(sizes), factor.device)
        mirrors = self.scale_factor(factor, sizes)
        tiles_low_rank.orthogonalize[(len(sizes),)](mirrors, orthonormal, strengths, plan, TILE=_TILE, **_EXACT)
        return orthonormal

    def fill_zero_rows(self, factor: Tensor, other: Tensor, sizes: Sizes) -> Tensor:
        rows = tuple((1, size) for rank, size in sizes for _ in range(rank))
        filled = torch.empty_like(factor)
        tiles_low_rank.fill_zero_rows[(len(rows),)](
            factor, other, filled, _plan(rows, factor.device), TILE=_TILE, **_EXACT
        )
        return filled


def _signed(seed: int) -> int:
    """The lowest 32 bits as a signed number: Triton compiles anew for an integer that needs more."""
    seed &= 0xFFFFFFFF
    return seed - 2**32 if seed >= 2**31 else seed


@functools.lru_cache(maxsize=1024)
def _plan(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(first entry, rank, size, ranks before) of each factor, int64, on the device."""
    rows, start, before = [], 0, 0
    for rank, size in sizes:
        rows.append((start, rank, size, before))
        start += rank * size
        before += rank
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _suits(bits: int, block: int) -> bool:
    """Tiles have powers of two as sides, and one program should hold a block in its registers."""
    return bits in (1, 2, 4, 8) and block & (block - 1) == 0 and 8 <= block <= 8192
