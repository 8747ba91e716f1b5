"""Blocks of codes: how they are laid out in memory, and the noise that rounds them.

Codes of ``bits`` bits are stored in planes. A block of n codes is split into widths that are powers of two and add up
to ``bits`` (3 = 2 + 1). Each width w takes n w / 8 bytes, whose byte i holds the codes i, i + n w / 8, ... from the low
bits up, so that packing and unpacking run over contiguous memory.
"""

from __future__ import annotations

import math

import torch

# What each code of ``natural`` stands for, in units of the scale.
POWERS = torch.tensor([sign * 2.0 ** (m - 127) if m else 0.0 for sign in (1, -1) for m in range(128)])


def num_blocks(numel: int, block: int) -> int:
    return -(-numel // block)


def empty_codes(grad: torch.Tensor, bits: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate what encodes ``grad``: uint8 planes, and one scale a block."""
    count = num_blocks(grad.numel(), block)
    return grad.new_empty(count * block * bits // 8, dtype=torch.uint8), grad.new_empty(count)


def to_blocks(vector: torch.Tensor, block: int) -> torch.Tensor:
    """Copy to (blocks, block), the last block padded with zeros."""
    blocks = vector.new_zeros(num_blocks(vector.numel(), block), block)
    blocks.view(-1)[: vector.numel()] = vector
    return blocks


def store_mean(
    total: torch.Tensor, count: int, out: torch.Tensor, add: bool, factors: torch.Tensor | None = None
) -> None:
    """Write, or add, ``total`` / ``count`` to ``out``, without the padding; times ``factors`` if there are any."""
    mean = total.div_(count).view(-1)[: out.numel()]
    if factors is not None:
        mean *= factors
    if add:
        out.add_(mean)
    else:
        out.copy_(mean)


def widths(bits: int) -> list[int]:
    """Return the powers of two that add up to ``bits``, largest first."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def to_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes (blocks, n), of an integer type that holds them, into 1-d uint8 of blocks * n * bits / 8 bytes."""
    count, size = codes.shape
    parts, shift = [], 0
    for width in widths(bits):
        planes = (codes >> shift if shift else codes).bitwise_and(2**width - 1).view(count, 8 // width, -1)
        part = planes[:, 0].clone()
        for plane in range(1, 8 // width):
            part |= planes[:, plane] << (plane * width)
        assert part.shape[1] == size * width // 8
        parts.append(part.to(torch.uint8))
        shift += width
    return torch.cat(parts, dim=1).view(-1)


def from_planes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack (blocks, n * bits / 8) bytes into codes (blocks, n): uint8, or int16 if they need more bits."""
    size = packed.shape[1] * 8 // bits
    dtype = torch.uint8 if bits <= 8 else torch.int16
    codes = torch.zeros(packed.shape[0], size, dtype=dtype, device=packed.device)
    shift = offset = 0
    for width in widths(bits):
        part = packed[:, offset : offset + size * width // 8]
        planes = [(part >> (plane * width)) & (2**width - 1) for plane in range(8 // width)]
        codes |= torch.cat(planes, dim=1).to(dtype) << shift
        shift += width
        offset += size * width // 8
    return codes


def noise(seed: int, blocks: torch.Tensor) -> torch.Tensor:
    """Uniform multiples of 2^-16 in [0, 1), one an entry: a hash of seed and position, the same on all backends.

    The hash is MurmurHash3's finalizer. One hash serves two entries, half a block apart.
    """
    mask = 0xFFFFFFFF
    x = torch.arange(blocks.numel() // 2, dtype=torch.int64, device=blocks.device)
    x = (x * 0x9E3779B9 + seed) & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    x = (x ^ (x >> 16)).view(len(blocks), -1)
    return torch.cat([x & 0xFFFF, x >> 16], dim=1).to(blocks.dtype) * 2.0**-16


def powers_above(largest: torch.Tensor) -> torch.Tensor:
    """The least power of two above each number, within the dtype's range; 0 for subnormal numbers and zero."""
    info = torch.finfo(largest.dtype)
    exponents = torch.frexp(largest).exponent.clamp_(max=math.frexp(info.max)[1] - 1)
    return torch.where(largest >= info.tiny, torch.ldexp(torch.ones_like(largest), exponents), 0)
