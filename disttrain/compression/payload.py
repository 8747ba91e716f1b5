"""Payloads: the tensors that a codec encodes a gradient as, and their layout in one message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

Payload: TypeAlias = Mapping[str, torch.Tensor]

_ALIGNMENT = 16  # bytes, so that every section can be viewed in its own dtype


class Section(NamedTuple):
    """One tensor of a payload, in the bytes from ``start`` to ``end`` of the message."""

    dtype: torch.dtype
    shape: torch.Size
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """The sections of a payload in a message. Each starts at a multiple of 16 bytes; gaps are zeros.

    Payloads of the same bucket and step have the same layout on all ranks.

    Attributes:
        nbytes: size of the message.
    """

    sections: Mapping[str, Section]
    nbytes: int

    @classmethod
    def of(cls, payload: Payload) -> Layout:
        """Return the layout of a payload."""
        sections, offset = {}, 0
        for name, tensor in payload.items():
            end = offset + tensor.nbytes
            sections[name] = Section(tensor.dtype, tensor.shape, offset, end)
            offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        return cls(sections, offset)

    def pack(self, payload: Payload, nbytes: int | None = None) -> torch.Tensor:
        """Copy all sections to one uint8 tensor of ``nbytes`` bytes, by default the size of the message."""
        device = next(iter(payload.values())).device
        packed = torch.empty(self.nbytes if nbytes is None else nbytes, dtype=torch.uint8, device=device)
        filled = 0
        for name, (_, _, start, end) in self.sections.items():
            packed[filled:start] = 0
            packed[start:end] = payload[name].contiguous().view(-1).view(torch.uint8)
            filled = end
        packed[filled:] = 0
        return packed

    def unpack(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the sections of a message, as views of it."""
        return {
            name: packed[start:end].view(dtype).view(shape)
            for name, (dtype, shape, start, end) in self.sections.items()
        }
