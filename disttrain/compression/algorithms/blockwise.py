"""Blockwise quantization: round to nearest in blocks (Dettmers et al. 2022, arXiv:2110.02861; 4 bits: 2212.09720)."""

from __future__ import annotations

from pydantic import Field

from disttrain.compression.algorithms.quantizer import Quantizer


class Blockwise8(Quantizer):
    """One byte an entry: round(127 x / max |x|) in blocks that share the maximum.

    Biased, |error| <= max / 254, so error feedback is on. Differs from the paper in the code, which is linear instead
    of a dynamic tree: rounding errors are not lost here, and linear codes need no table.
    """

    name = "blockwise8"

    block_size: int = Field(default=512, ge=16, multiple_of=16, description="entries that share one scale")

    @property
    def width(self) -> int:
        return 8


class Blockwise4(Quantizer):
    """Four bits an entry: round(7 x / max |x|) in small blocks. Biased, so error feedback is on."""

    name = "blockwise4"

    block_size: int = Field(default=256, ge=16, multiple_of=16, description="entries that share one scale")

    @property
    def width(self) -> int:
        return 4
