"""Chunks of a vector, of each of which the largest entries are taken, and the form in which these are sent.

Positions inside a chunk are codes of 12 bits, and so are values codes if they are rounded. The codes of all chunks are
one block in the layout of ``blocks``, padded with zeros to whole bytes.
"""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch

from disttrain.kernels.blocks import from_planes, num_blocks, to_planes, widths

MAX_CHUNK = 4096  # entries
POSITION_BITS = 12


class Chunks(NamedTuple):
    """How a vector is divided, and how many entries are taken.

    Attributes:
        size: entries of a chunk, at most 4096. The last chunk may be shorter.
        kept: entries taken of each whole chunk.
        kept_of_rest: entries taken of a shorter chunk at the end; unused if there is none.
    """

    size: int
    kept: int
    kept_of_rest: int

    def count(self, numel: int) -> int:
        """Return how many entries are taken of a vector."""
        whole, rest = divmod(numel, self.size)
        return whole * self.kept + (self.kept_of_rest if rest else 0)

    def rows(self, vector: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
        """Return (view with one chunk a row, entries taken of each row): the whole chunks, and the shorter one."""
        end = vector.numel() // self.size * self.size
        parts = [(vector[:end].view(-1, self.size), self.kept), (vector[end:].view(1, -1), self.kept_of_rest)]
        return [(rows, kept) for rows, kept in parts if rows.numel()]

    def of_entries(self, of_chunks: torch.Tensor, numel: int) -> torch.Tensor:
        """Repeat numbers, one a chunk, for each entry that is taken of a vector."""
        whole = numel // self.size
        return torch.cat(
            [
                of_chunks[:whole].unsqueeze(1).expand(-1, self.kept).reshape(-1),
                of_chunks[whole:].unsqueeze(1).expand(-1, self.kept_of_rest).reshape(-1),
            ]
        )

    def starts(self, numel: int, device: torch.device) -> torch.Tensor:
        """Return the index at which each chunk starts, int64."""
        return torch.arange(num_blocks(numel, self.size), device=device) * self.size


class Entries(NamedTuple):
    """The entries taken of all chunks, as they are sent.

    Attributes:
        values: (entries,) in the vector's dtype or as bfloat16; or packed codes, uint8.
        scales: (2 * chunks,), the smallest magnitude taken of each chunk and then the steps between magnitudes; empty
            if values are no codes.
        positions: packed, uint8, ascending in each chunk.
    """

    values: torch.Tensor
    scales: torch.Tensor
    positions: torch.Tensor


def is_coded(value_bits: int | None) -> TypeGuard[int]:
    """Whether values of this width are codes with scales."""
    return value_bits is not None and value_bits <= 8


def num_levels(value_bits: int) -> int:
    """Return the number of steps between the smallest and the largest magnitude: one bit is the sign."""
    return int(2 ** (value_bits - 1)) - 1


def padded(count: int, bits: int) -> int:
    """Return the number of codes that are packed for ``count``, so that they fill whole bytes."""
    codes_of_byte = 8 // min(widths(bits))
    return -(-count // codes_of_byte) * codes_of_byte


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack 1-d codes as one block."""
    padding = padded(codes.numel(), bits) - codes.numel()
    return to_planes(torch.nn.functional.pad(codes, (0, padding)).unsqueeze(0), bits)


def unpack(packed: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """Unpack the first ``count`` codes."""
    return from_planes(packed.unsqueeze(0), bits).view(-1)[:count]


def encode_values(values: torch.Tensor, bits: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round values, (chunks, entries taken of each), to this many bits.

    Returns:
        The values sent or their codes, the scales (2, chunks), and what the receiver decodes.
    """
    if bits is None:
        return values, values.new_empty(2, 0), values
    if bits == 16:
        bound = torch.finfo(torch.bfloat16).max
        rounded = values.clamp(-bound, bound).to(torch.bfloat16)
        return rounded, values.new_empty(2, 0), rounded.to(values.dtype)
    levels = num_levels(bits)
    magnitude = values.abs()
    low, high = magnitude.amin(1, keepdim=True), magnitude.amax(1, keepdim=True)
    step = (high - low) / levels
    level = torch.where(step > 0, ((magnitude - low) / step).round(), 0).clamp_(max=levels)
    negative = values < 0
    codes = level.to(torch.uint8) | (negative.to(torch.uint8) << (bits - 1))
    sent = level * step + low
    return codes, torch.stack([low.view(-1), step.view(-1)]), torch.where(negative, -sent, sent)


def decode_values(entries: Entries, chunks: Chunks, bits: int | None, out: torch.Tensor) -> torch.Tensor:
    """Return the values of all entries taken of a vector like ``out``."""
    if not is_coded(bits):
        return entries.values.to(out.dtype)
    codes = unpack(entries.values, chunks.count(out.numel()), bits)
    low, step = (chunks.of_entries(scale, out.numel()) for scale in entries.scales.view(2, -1))
    magnitude = (codes & num_levels(bits)).to(out.dtype) * step + low
    return torch.where(codes >> (bits - 1) != 0, -magnitude, magnitude)


def pack_entries(coded: torch.Tensor, scales: torch.Tensor, positions: torch.Tensor, bits: int | None) -> Entries:
    """Pack positions, int16, and values if these are codes."""
    values = pack(coded, bits) if is_coded(bits) else coded
    return Entries(values, scales.reshape(-1), pack(positions, POSITION_BITS))
