"""The kernels for GPUs, in Triton: one pass over memory each, one program a block.

What is missing here, and widths or blocks that do not suit tiles, runs as the reference in torch on the GPU. Results
are the reference's, but for the last bit of a residual, where the compiler may fuse a product and a sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from disttrain.kernels.reference import Kernels, Tensor, num_blocks

_MAGIC = {torch.float32: 1.5 * 2**23, torch.float64: 1.5 * 2**52}


class CudaKernels(Kernels):
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
            LEVELS=2 ** (bits - 1) - 1, BITS=bits, PLANES=8 // bits, LENGTH=block * bits // 8,
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
            ADD=add, LEVELS=2 ** (bits - 1) - 1, BITS=bits, PLANES=8 // bits, LENGTH=block * bits // 8,
        )  # fmt: skip

    def sign(self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
        if not _suits(1, block):
            return super().sign(grad, residual, rest, block)
        count = num_blocks(grad.numel(), block)
        bits = torch.empty(count * block // 8, dtype=torch.uint8, device=grad.device)
        scales = torch.empty(count, dtype=grad.dtype, device=grad.device)
        _sign[(count,)](
            grad, grad if residual is None else residual, grad if rest is None else rest, bits, scales, grad.numel(),
            HAS_RESIDUAL=residual is not None, HAS_REST=rest is not None, LENGTH=block // 8,
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
            ADD=add, LENGTH=block // 8,
        )  # fmt: skip


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
    scale = tl.max(tl.max(tl.abs(values), axis=1), axis=0) / LEVELS
    scale = tl.where(scale >= tiny, scale, 0.0)
    inverse = tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)
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


@triton.jit
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
    mean = total / count
    if ADD:
        mean += tl.load(out + offsets, mask=inside, other=0.0)
    tl.store(out + offsets, mean, mask=inside)


@triton.jit
def _sign(
    grad, residual, rest, bits, scales, numel,
    HAS_RESIDUAL: tl.constexpr, HAS_REST: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    plane = tl.arange(0, 8)[:, None]
    offsets = index * (8 * LENGTH) + plane * LENGTH + tl.arange(0, LENGTH)[None, :]
    inside = offsets < numel
    values = _load(grad, residual, offsets, inside, HAS_RESIDUAL)
    scale = tl.sum(tl.sum(tl.abs(values), axis=1), axis=0) / tl.minimum(8 * LENGTH, numel - index * (8 * LENGTH))
    negative = values < 0
    packed = tl.sum(negative.to(tl.int32) << plane, axis=0)
    tl.store(bits + index * LENGTH + tl.arange(0, LENGTH), packed.to(tl.uint8))
    tl.store(scales + index, scale)
    if HAS_REST:
        tl.store(rest + offsets, values - tl.where(negative, -scale, scale), mask=inside)


@triton.jit
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
