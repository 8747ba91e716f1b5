"""The kernels for GPUs, in Triton: few passes over memory.

This file converts tensors to launches; the programs are in ``tiles*``. Kernels that are missing
here, and widths or blocks that do not suit tiles, run as the reference in torch on the GPU. So do PowerSGD's products,
which cuBLAS computes. Results are bit-identical to those of the reference on a CPU, except for sums, whose order
differs, and for some new residuals, which the reference rounds once less.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from disttrain.kernels.blocks import empty_codes, num_blocks
from disttrain.kernels.chunks import Chunks, Entries, is_coded, num_levels, pack_entries
from disttrain.kernels.cuda import tiles, tiles_chunks, tiles_low_rank
from disttrain.kernels.factors import Sizes
from disttrain.kernels.feedback import Feedback
from disttrain.kernels.reference import Tensor
from disttrain.kernels.threshold_search import ThresholdSearchKernels

_MAGIC = {torch.float32: 1.5 * 2**23, torch.float64: 1.5 * 2**52}
_TILE = 1024  # entries that a program processes at once, where no block determines it
_EXACT = {"enable_fp_fusion": False}  # round products and sums separately, as torch does


class CudaKernels(ThresholdSearchKernels):
    def _collect(
        self, grad: Tensor, feedback: Feedback | None, threshold: float, capacity: int, *, clear: bool
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        # A first pass counts the entries of each tile. The second one then knows where each tile's entries begin, and
        # writes them in ascending order without atomics.
        residual, total, has_residual, _ = _operands(grad, feedback)
        values, indices = grad.new_zeros(capacity), torch.zeros(capacity, dtype=torch.int32, device=grad.device)
        num_tiles = num_blocks(grad.numel(), _TILE)
        counts = torch.empty(num_tiles, dtype=torch.int32, device=grad.device)
        bound = torch.full((1,), threshold, dtype=grad.dtype, device=grad.device)
        tiles.count_above[(num_tiles,)](
            grad, residual, total, bound, counts, grad.numel(), HAS_RESIDUAL=has_residual, TILE=_TILE, **_EXACT
        )
        ends = counts.cumsum(0)
        tiles.write_above[(num_tiles,)](
            total, bound, ends - counts, values, indices, grad.numel(), capacity, CLEAR=clear, TILE=_TILE, **_EXACT
        )
        return total, values, indices, int(ends[-1])

    def _select(self, total: Tensor, values: Tensor, indices: Tensor, k: int, *, clear: bool) -> tuple[Tensor, Tensor]:
        largest, positions = self._largest(values, k, clear=False)
        chosen = indices[positions.long()]
        if clear:
            total[chosen.long()] = 0
        return largest, chosen

    def take_largest_of_chunks(
        self, grad: Tensor, feedback: Feedback | None, chunks: Chunks, value_bits: int | None
    ) -> Entries:
        if chunks.size & (chunks.size - 1) != 0:
            return super().take_largest_of_chunks(grad, feedback, chunks, value_bits)
        residual, new_residual, has_residual, has_feedback = _operands(grad, feedback)
        numel, coded = grad.numel(), is_coded(value_bits)
        count, num_chunks = chunks.count(numel), num_blocks(numel, chunks.size)
        values = grad.new_empty(0 if coded else count)
        codes = grad.new_empty(count if coded else 0, dtype=torch.uint8)
        scales = grad.new_empty(2 * num_chunks if coded else 0)
        positions = grad.new_empty(count, dtype=torch.int16)
        tiles_chunks.take_of_chunk[(num_chunks,)](
            grad, residual, new_residual, values, codes, scales, positions,
            numel, chunks.kept, chunks.kept_of_rest, num_chunks,
            HAS_RESIDUAL=has_residual, HAS_FEEDBACK=has_feedback, MAGIC=_MAGIC[grad.dtype],
            NUMBER_BITS=8 * grad.itemsize, VALUE_BITS=value_bits or 0,
            LEVELS=num_levels(value_bits) if is_coded(value_bits) else 0, CHUNK=chunks.size, **_EXACT,
        )  # fmt: skip
        if coded:
            return pack_entries(codes, scales, positions, value_bits)
        sent = values.to(torch.bfloat16) if value_bits == 16 else values
        return pack_entries(sent, scales, positions, value_bits)

    def quantize(
        self, grad: Tensor, feedback: Feedback | None, bits: int, block: int, seed: int | None
    ) -> tuple[Tensor, Tensor]:
        if not _suits_tiles(bits, block):
            return super().quantize(grad, feedback, bits, block, seed)
        grad = _converted(grad, feedback)
        residual, new_residual, has_residual, has_feedback = _operands(grad, feedback)
        codes, scales = empty_codes(grad, bits, block)
        tiles.quantize[(scales.numel(),)](
            grad, residual, new_residual, codes, scales, grad.numel(), _signed(seed or 0),
            HAS_RESIDUAL=has_residual, HAS_FEEDBACK=has_feedback, AT_RANDOM=seed is not None,
            TINY=torch.finfo(grad.dtype).tiny, MAGIC=_MAGIC[grad.dtype],
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
        factors: Tensor | None = None,
    ) -> None:
        if not _suits_tiles(bits, block):
            super().dequantize_mean(codes, scales, bits, block, out, add=add, factors=factors)
            return
        count = scales[0].numel()
        tiles.dequantize[(count,)](
            torch.stack(list(codes)), torch.stack(list(scales)), out if factors is None else factors, out,
            out.numel(), len(codes), count,
            ADD=add, HAS_FACTORS=factors is not None,
            LEVELS=2 ** (bits - 1) - 1, BITS=bits, PLANES=8 // bits, LENGTH=block * bits // 8, **_EXACT,
        )  # fmt: skip

    def sign(self, grad: Tensor, feedback: Feedback | None, block: int) -> tuple[Tensor, Tensor]:
        if not _suits_tiles(1, block):
            return super().sign(grad, feedback, block)
        grad = _converted(grad, feedback)
        residual, new_residual, has_residual, has_feedback = _operands(grad, feedback)
        bits, scales = empty_codes(grad, 1, block)
        tiles.sign[(scales.numel(),)](
            grad, residual, new_residual, bits, scales, grad.numel(),
            HAS_RESIDUAL=has_residual, HAS_FEEDBACK=has_feedback, LENGTH=block // 8, **_EXACT,
        )  # fmt: skip
        return bits, scales

    def sign_mean(
        self,
        bits: Sequence[Tensor],
        scales: Sequence[Tensor],
        block: int,
        out: Tensor,
        *,
        add: bool = False,
        factors: Tensor | None = None,
    ) -> None:
        if not _suits_tiles(1, block):
            super().sign_mean(bits, scales, block, out, add=add, factors=factors)
            return
        count = scales[0].numel()
        tiles.sign_mean[(count,)](
            torch.stack(list(bits)), torch.stack(list(scales)), out if factors is None else factors, out,
            out.numel(), len(bits), count,
            ADD=add, HAS_FACTORS=factors is not None, LENGTH=block // 8, **_EXACT,
        )  # fmt: skip

    def sign_and_level(self, grad: Tensor, feedback: Feedback | None, block: int) -> tuple[Tensor, Tensor]:
        if not _suits_tiles(2, block):
            return super().sign_and_level(grad, feedback, block)
        residual, new_residual, has_residual, has_feedback = _operands(grad, feedback)
        codes, low = empty_codes(grad, 2, block)
        scales, count = grad.new_empty(2 * low.numel()), low.numel()
        tiles.sign_and_level[(count,)](
            grad, residual, new_residual, codes, scales, grad.numel(), count,
            HAS_RESIDUAL=has_residual, HAS_FEEDBACK=has_feedback, LENGTH=block // 4, **_EXACT,
        )  # fmt: skip
        return codes, scales

    def sign_and_level_mean(
        self, codes: Sequence[Tensor], scales: Sequence[Tensor], block: int, out: Tensor, *, add: bool = False
    ) -> None:
        if not _suits_tiles(2, block):
            super().sign_and_level_mean(codes, scales, block, out, add=add)
            return
        count = scales[0].numel() // 2
        tiles.sign_and_level_mean[(count,)](
            torch.stack(list(codes)), torch.stack(list(scales)), out, out.numel(), len(codes), count,
            ADD=add, LENGTH=block // 4, **_EXACT,
        )  # fmt: skip

    def scale_factor(self, factor: Tensor, sizes: Sizes) -> Tensor:
        scaled = torch.empty_like(factor)
        tiles_low_rank.scale[(len(sizes),)](factor, scaled, _plan(tuple(sizes), factor.device), TILE=_TILE, **_EXACT)
        return scaled

    def orthogonalize(self, factor: Tensor, sizes: Sizes) -> Tensor:
        orthonormal = torch.zeros_like(factor)
        strengths = factor.new_empty(sum(rank for rank, _ in sizes), dtype=torch.float64)
        plan = _plan(tuple(sizes), factor.device)
        reflectors = self.scale_factor(factor, sizes)
        tiles_low_rank.orthogonalize[(len(sizes),)](reflectors, orthonormal, strengths, plan, TILE=_TILE, **_EXACT)
        return orthonormal

    def fill_zero_rows(self, factor: Tensor, other: Tensor, sizes: Sizes) -> Tensor:
        rows = tuple((1, size) for rank, size in sizes for _ in range(rank))
        filled = torch.empty_like(factor)
        tiles_low_rank.fill_zero_rows[(len(rows),)](
            factor, other, filled, _plan(rows, factor.device), TILE=_TILE, **_EXACT
        )
        return filled


def _converted(grad: Tensor, feedback: Feedback | None) -> Tensor:
    """Return the gradient in the units of the feedback."""
    return grad if feedback is None or feedback.units is None else feedback.units.convert(grad)


def _operands(grad: Tensor, feedback: Feedback | None) -> tuple[Tensor, Tensor, bool, bool]:
    """Return (residual, new residual, whether there is a residual, whether there is feedback).

    ``grad`` takes the place of tensors that do not exist, since a launch needs a pointer.
    """
    if feedback is None:
        return grad, grad, False, False
    residual, new_residual, _ = feedback
    return grad if residual is None else residual, new_residual, residual is not None, True


def _signed(seed: int) -> int:
    """Return the lowest 32 bits as a signed number: Triton would recompile for an integer that needs more bits."""
    seed &= 0xFFFFFFFF
    return seed - 2**32 if seed >= 2**31 else seed


@functools.lru_cache(maxsize=1024)
def _plan(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return (first entry, rank, size, sum of the ranks before) of each factor, int64, on the device."""
    rows, start, before = [], 0, 0
    for rank, size in sizes:
        rows.append((start, rank, size, before))
        start += rank * size
        before += rank
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _suits_tiles(bits: int, block: int) -> bool:
    """Whether a block makes a tile: its sides must be powers of two, and it should fit a program's registers."""
    return bits in (1, 2, 4, 8) and block & (block - 1) == 0 and 8 <= block <= 8192
