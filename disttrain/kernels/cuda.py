"""The kernels for GPUs, in Triton: few passes over memory, one program a block or a factor.

What is missing here, and widths or blocks that do not suit tiles, runs as the reference in torch on the GPU; so do
PowerSGD's products, for which cuBLAS is there. Results are the reference's (on a CPU) to the bit, but for sums, whose
order is another, and what follows from them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from disttrain.kernels.reference import Kernels, Sizes, Tensor, num_blocks

_MAGIC = {torch.float32: 1.5 * 2**23, torch.float64: 1.5 * 2**52}
_TILE = 1024  # entries that a program works on at a time, where no block says so
_EXACT = {"enable_fp_fusion": False}  # a product and a sum are rounded each, as torch does
# One compiled form for all numbers: a rehearsal is to be the last time that anything is compiled.
_jit = triton.jit(do_not_specialize=["numel", "capacity", "count", "blocks", "seed"])


class CudaKernels(Kernels):
    def take_largest(self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        numel = grad.numel()
        if numel < 4096 or 4 * k > numel:
            return super().take_largest(grad, residual, rest, k)
        # As on the CPU: what reaches a threshold that is rather too low, and the largest of that.
        threshold = self.estimate_threshold(grad, residual, 1.25 * k / numel)
        near, places, count = self._collect(grad, residual, rest, threshold, 2 * k + 1024, clear=False)
        if not k <= count <= len(near):
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
        tiles = num_blocks(grad.numel(), _TILE)
        counts = torch.empty(tiles, dtype=torch.int32, device=grad.device)
        bound = torch.full((1,), threshold, dtype=grad.dtype, device=grad.device)
        has_rest = rest is not None
        _count_above[(tiles,)](
            grad, grad if residual is None else residual, grad if rest is None else rest, bound, counts, grad.numel(),
            HAS_RESIDUAL=residual is not None, HAS_REST=has_rest, TILE=_TILE, **_EXACT,
        )  # fmt: skip
        ends = counts.cumsum(0)
        total, owed = (grad, residual) if rest is None else (rest, None)
        _write_above[(tiles,)](
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
        _quantize[(count,)](
            grad, grad if residual is None else residual, grad if rest is None else rest, codes, scales, grad.numel(),
            (seed or 0) & 0xFFFFFFFF, torch.finfo(grad.dtype).tiny, _MAGIC[grad.dtype],
            HAS_RESIDUAL=residual is not None, HAS_REST=rest is not None, AT_RANDOM=seed is not None,
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
        _dequantize[(count,)](
            torch.stack(list(codes)), torch.stack(list(scales)), out, out.numel(), len(codes), count,
            ADD=add, LEVELS=2 ** (bits - 1) - 1, BITS=bits, PLANES=8 // bits, LENGTH=block * bits // 8, **_EXACT,
        )  # fmt: skip

    def sign(self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
        if not _suits(1, block):
            return super().sign(grad, residual, rest, block)
        count = num_blocks(grad.numel(), block)
        bits = torch.empty(count * block // 8, dtype=torch.uint8, device=grad.device)
        scales = torch.empty(count, dtype=grad.dtype, device=grad.device)
        _sign[(count,)](
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
        _sign_mean[(count,)](
            torch.stack(list(bits)), torch.stack(list(scales)), out, out.numel(), len(bits), count,
            ADD=add, LENGTH=block // 8, **_EXACT,
        )  # fmt: skip

    def scale_factor(self, factor: Tensor, sizes: Sizes) -> Tensor:
        scaled = torch.empty_like(factor)
        _scale_factors[(len(sizes),)](factor, scaled, _plan(tuple(sizes), factor.device), TILE=_TILE, **_EXACT)
        return scaled

    def orthogonalize(self, factor: Tensor, sizes: Sizes) -> Tensor:
        orthonormal = torch.zeros_like(factor)
        strengths = factor.new_empty(sum(rank for rank, _ in sizes), dtype=torch.float64)
        plan = _plan(tuple(sizes), factor.device)
        mirrors = self.scale_factor(factor, sizes)
        _orthogonalize[(len(sizes),)](mirrors, orthonormal, strengths, plan, TILE=_TILE, **_EXACT)
        return orthonormal

    def fill_zero_rows(self, factor: Tensor, other: Tensor, sizes: Sizes) -> Tensor:
        rows = tuple((1, size) for rank, size in sizes for _ in range(rank))
        filled = torch.empty_like(factor)
        _fill_zeros[(len(rows),)](factor, other, filled, _plan(rows, factor.device), TILE=_TILE, **_EXACT)
        return filled


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


# A block is a tile (PLANES, LENGTH): its rows are the planes of the packed form.


@triton.jit
def _load(grad, residual, offsets, inside, HAS_RESIDUAL: tl.constexpr):
    values = tl.load(grad + offsets, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        values += tl.load(residual + offsets, mask=inside, other=0.0)
    return values


@triton.jit
def _divide(a, b):
    """Rounded as IEEE 754 has it; Triton's own division of float32 is not."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@_jit
def _count_above(
    grad, residual, rest, bound, counts, numel,
    HAS_RESIDUAL: tl.constexpr, HAS_REST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    offsets = index * TILE + tl.arange(0, TILE)
    inside = offsets < numel
    values = _load(grad, residual, offsets, inside, HAS_RESIDUAL)
    if HAS_REST:
        tl.store(rest + offsets, values, mask=inside)
    found = (tl.abs(values) >= tl.load(bound)) & (values != 0)
    tl.store(counts + index, tl.sum(found.to(tl.int32), axis=0))


@_jit
def _write_above(
    total, residual, bound, starts, found_values, found_indices, numel, capacity,
    HAS_RESIDUAL: tl.constexpr, CLEAR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    offsets = index * TILE + tl.arange(0, TILE)
    values = _load(total, residual, offsets, offsets < numel, HAS_RESIDUAL)
    found = (tl.abs(values) >= tl.load(bound)) & (values != 0)
    place = tl.load(starts + index) + tl.cumsum(found.to(tl.int32), axis=0) - 1
    taken = found & (place < capacity)
    tl.store(found_values + place, values, mask=taken)
    tl.store(found_indices + place, offsets.to(tl.int32), mask=taken)
    if CLEAR:
        tl.store(total + offsets, tl.zeros_like(values), mask=taken)


@_jit
def _quantize(
    grad, residual, rest, codes, scales, numel, seed, tiny, magic,
    HAS_RESIDUAL: tl.constexpr, HAS_REST: tl.constexpr, AT_RANDOM: tl.constexpr,
    LEVELS: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    plane = tl.arange(0, PLANES)[:, None]
    place = plane * LENGTH + tl.arange(0, LENGTH)[None, :]
    offsets = index * (PLANES * LENGTH) + place
    inside = offsets < numel
    values = _load(grad, residual, offsets, inside, HAS_RESIDUAL)
    scale = _divide(tl.max(tl.max(tl.abs(values), axis=1), axis=0), tl.full((), LEVELS, values.dtype))
    scale = tl.where(scale >= tiny, scale, 0.0)
    inverse = tl.where(scale > 0, _divide(tl.full((), 1.0, scale.dtype), tl.where(scale > 0, scale, 1.0)), 0.0)
    scaled = values * inverse
    if AT_RANDOM:
        half = PLANES * LENGTH // 2
        pair = index.to(tl.uint32) * half + (place % half).to(tl.uint32)
        x = pair * 0x9E3779B9 + seed.to(tl.uint32)
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        x = x ^ (x >> 16)
        noise = tl.where(place < half, x & 0xFFFF, x >> 16).to(values.dtype) * 0.0000152587890625
        rounded = tl.floor(scaled + noise)
    else:
        rounded = (scaled + magic) - magic
    rounded = tl.minimum(tl.maximum(rounded, -LEVELS), LEVELS)
    packed = tl.sum((rounded + LEVELS).to(tl.int32) << (plane * BITS), axis=0)
    tl.store(codes + index * LENGTH + tl.arange(0, LENGTH), packed.to(tl.uint8))
    tl.store(scales + index, scale)
    if HAS_REST:
        tl.store(rest + offsets, values - rounded * scale, mask=inside)


@_jit
def _dequantize(
    codes, scales, out, numel, count, blocks,
    ADD: tl.constexpr, LEVELS: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    plane = tl.arange(0, PLANES)[:, None]
    column = tl.arange(0, LENGTH)[None, :]
    offsets = index * (PLANES * LENGTH) + plane * LENGTH + column
    inside = offsets < numel
    total = tl.zeros((PLANES, LENGTH), dtype=out.dtype.element_ty)
    for part in range(count):
        packed = tl.load(codes + (part * blocks + index) * LENGTH + column).to(tl.int32)
        code = (packed >> (plane * BITS)) & ((1 << BITS) - 1)
        total += (code - LEVELS).to(total.dtype) * tl.load(scales + part * blocks + index)
    _store_mean(out, total, count, offsets, inside, ADD)


@triton.jit
def _store_mean(out, total, count, offsets, inside, ADD: tl.constexpr):
    mean = _divide(total, count.to(total.dtype))
    if ADD:
        mean += tl.load(out + offsets, mask=inside, other=0.0)
    tl.store(out + offsets, mean, mask=inside)


@_jit
def _sign(
    grad, residual, rest, bits, scales, numel,
    HAS_RESIDUAL: tl.constexpr, HAS_REST: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    plane = tl.arange(0, 8)[:, None]
    offsets = index * (8 * LENGTH) + plane * LENGTH + tl.arange(0, LENGTH)[None, :]
    inside = offsets < numel
    values = _load(grad, residual, offsets, inside, HAS_RESIDUAL)
    size = tl.minimum(8 * LENGTH, numel - index * (8 * LENGTH))
    scale = _divide(tl.sum(tl.sum(tl.abs(values), axis=1), axis=0), size.to(values.dtype))
    negative = values < 0
    packed = tl.sum(negative.to(tl.int32) << plane, axis=0)
    tl.store(bits + index * LENGTH + tl.arange(0, LENGTH), packed.to(tl.uint8))
    tl.store(scales + index, scale)
    if HAS_REST:
        tl.store(rest + offsets, values - tl.where(negative, -scale, scale), mask=inside)


@_jit
def _sign_mean(bits, scales, out, numel, count, blocks, ADD: tl.constexpr, LENGTH: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    plane = tl.arange(0, 8)[:, None]
    column = tl.arange(0, LENGTH)[None, :]
    offsets = index * (8 * LENGTH) + plane * LENGTH + column
    inside = offsets < numel
    total = tl.zeros((8, LENGTH), dtype=out.dtype.element_ty)
    for part in range(count):
        packed = tl.load(bits + (part * blocks + index) * LENGTH + column).to(tl.int32)
        scale = tl.load(scales + part * blocks + index)
        total += tl.where(((packed >> plane) & 1) != 0, -scale, scale)
    _store_mean(out, total, count, offsets, inside, ADD)


# A program has a factor, (rank, size), to itself. Threads meet at barriers wherever one reads what another wrote.


@triton.jit
def _find_factor(plan):
    entry = plan + 4 * tl.program_id(0)
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def _largest(vector, begin, end, TILE: tl.constexpr):
    largest = tl.zeros((TILE,), dtype=vector.dtype.element_ty)
    for start in range(begin, end, TILE):
        place = start + tl.arange(0, TILE)
        largest = tl.maximum(largest, tl.abs(tl.load(vector + place, mask=place < end, other=0.0)))
    return tl.max(largest, axis=0)


@triton.jit
def _copy_divided(source, target, begin, end, divisor, TILE: tl.constexpr):
    for start in range(begin, end, TILE):
        place = start + tl.arange(0, TILE)
        values = tl.load(source + place, mask=place < end, other=0.0)
        tl.store(target + place, _divide(values, divisor), mask=place < end)


@triton.jit
def _dot(a, b, begin, end, TILE: tl.constexpr):
    """In float64, or rows as long as a vocabulary would be orthogonal to three digits only."""
    total = tl.zeros((TILE,), dtype=tl.float64)
    for start in range(begin, end, TILE):
        place = start + tl.arange(0, TILE)
        inside = place < end
        left, right = tl.load(a + place, mask=inside, other=0.0), tl.load(b + place, mask=inside, other=0.0)
        total += left.to(tl.float64) * right.to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _make_mirror(row, first, size, TILE: tl.constexpr):
    """The row becomes the mirror that reflects it into its first axis; 2 / |mirror|^2, or 0 if there is nothing."""
    largest = _largest(row, first, size, TILE)
    tl.debug_barrier()
    _copy_divided(row, row, first, size, tl.where(largest > 0, largest, 1.0), TILE)
    tl.debug_barrier()
    length = tl.sqrt(_dot(row, row, first, size, TILE))
    head = tl.load(row + first)
    tl.debug_barrier()
    tl.store(row + first, head + tl.where(head >= 0, length, -length).to(head.dtype))
    tl.debug_barrier()
    square = _dot(row, row, first, size, TILE)
    return tl.where(square > 0, 2 / tl.where(square > 0, square, 1.0), 0.0)


@triton.jit
def _reflect(mirror, strength, row, first, size, TILE: tl.constexpr):
    part = (strength * _dot(mirror, row, first, size, TILE)).to(row.dtype.element_ty)
    tl.debug_barrier()
    for start in range(first, size, TILE):
        place = start + tl.arange(0, TILE)
        inside = place < size
        values = tl.load(row + place, mask=inside, other=0.0) - part * tl.load(mirror + place, mask=inside, other=0.0)
        tl.store(row + place, values, mask=inside)
    tl.debug_barrier()


@triton.jit
def _orthogonalize(factor, orthonormal, strengths, plan, TILE: tl.constexpr):
    """By Householder's reflections, as on the CPU; ``factor`` is used up, ``orthonormal`` comes as zeros."""
    start, rank, size, before = _find_factor(plan)
    mirrors, spanning = factor + start, orthonormal + start
    for k in range(rank):
        strength = _make_mirror(mirrors + k * size, k, size, TILE)
        tl.store(strengths + before + k, strength)
        for j in range(k + 1, rank):
            _reflect(mirrors + k * size, strength, mirrors + j * size, k, size, TILE)
    tl.debug_barrier()
    for done in range(rank):
        k = rank - 1 - done
        strength = tl.load(strengths + before + k)
        tl.store(spanning + k * size + k, 1.0)
        tl.debug_barrier()
        for j in range(k, rank):
            _reflect(mirrors + k * size, strength, spanning + j * size, k, size, TILE)


@triton.jit
def _scale_factors(factor, scaled, plan, TILE: tl.constexpr):
    start, rank, size, _ = _find_factor(plan)
    largest = _largest(factor + start, 0, rank * size, TILE)
    divisor = tl.where(largest > 0, largest, 1.0)
    _copy_divided(factor + start, scaled + start, 0, rank * size, divisor, TILE)


@triton.jit
def _fill_zeros(factor, other, filled, plan, TILE: tl.constexpr):
    start, _, size, _ = _find_factor(plan)
    is_zero = _largest(factor + start, 0, size, TILE) == 0
    for begin in range(0, size, TILE):
        place = start + begin + tl.arange(0, TILE)
        inside = begin + tl.arange(0, TILE) < size
        own, before = tl.load(factor + place, mask=inside, other=0.0), tl.load(other + place, mask=inside, other=0.0)
        tl.store(filled + place, tl.where(is_zero, before, own), mask=inside)
