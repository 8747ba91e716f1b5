"""QSGD: stochastic rounding to a few levels of each block's norm (Alistarh et al. 2017, arXiv:1610.02132)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from disttrain.compression.base import Bucket, State
from disttrain.compression.codec import Codec, Payload


class QSGD(Codec):
    """Send sign and level of every entry in ``bits`` bits, and one norm a block.

    With s = 2^(bits-1) - 1 levels: Q(x)_i = ||x|| sign(x_i) xi_i / s, where xi_i is s |x_i| / ||x|| rounded up or
    down at random so that E[Q(x)] = x; E||Q(x) - x||^2 <= min(n/s^2, sqrt(n)/s) ||x||^2 for blocks of n. Unbiased, so
    error feedback is off by default. Wire: bits/8 + (value size)/n bytes an entry, all-gathered.
    """

    name = "qsgd"

    bits: Literal[2, 4, 8] = Field(default=4, description="bits an entry, sign included")
    block_size: int = Field(default=512, ge=8, multiple_of=8, description="entries that share one norm")
    seed: int = Field(default=0, description="of the private random generators")
    error_feedback: bool = Field(default=False, description="add the rounding error to the next gradient")

    @property
    def levels(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    def encode(self, acc: torch.Tensor, bucket: Bucket, state: State) -> Payload:
        blocks = acc.new_zeros(-(-acc.numel() // self.block_size), self.block_size)
        blocks.view(-1)[: acc.numel()] = acc
        largest = blocks.abs().amax(dim=1, keepdim=True)
        scaled = blocks / torch.where(largest > 0, largest, 1.0)  # squares of the raw entries could overflow
        norms = largest.squeeze(1) * scaled.norm(dim=1)
        # Ranks must round independently, or their errors would add up instead of averaging out.
        generator = bucket.generator(self.seed, state.step, per_rank=True)
        noise = torch.rand(blocks.shape, generator=generator, dtype=blocks.dtype, device=blocks.device)
        scale = torch.where(norms > 0, self.levels / norms, 0.0).unsqueeze(1)
        # Clamped, because rounding may lift the largest entry of a block of one non-zero a hair above the last level.
        levels = (blocks.abs() * scale + noise).floor_().clamp_(max=self.levels).copysign_(blocks)
        payload = {"norms": norms, "codes": self._pack((levels + self.levels).to(torch.uint8))}
        if self.error_feedback:
            acc.sub_(self._decode(payload, bucket))
        return payload

    def decode_add(self, payload: Payload, out: torch.Tensor, bucket: Bucket) -> None:
        out.add_(self._decode(payload, bucket))

    def _decode(self, payload: Payload, bucket: Bucket) -> torch.Tensor:
        norms = payload["norms"]
        levels = self._unpack(payload["codes"]).to(norms.dtype).sub_(self.levels)
        return levels.view(-1, self.block_size).mul_(norms.unsqueeze(1) / self.levels).view(-1)[: bucket.numel]

    def _pack(self, codes: torch.Tensor) -> torch.Tensor:
        """8 / bits codes a byte, the first in the lowest bits."""
        per_byte = 8 // self.bits
        columns = codes.view(-1, per_byte)
        packed = columns[:, 0].clone()
        for column in range(1, per_byte):
            packed |= columns[:, column] << (column * self.bits)
        return packed

    def _unpack(self, packed: torch.Tensor) -> torch.Tensor:
        mask = 2**self.bits - 1
        return torch.stack([(packed >> shift) & mask for shift in range(0, 8, self.bits)], dim=1).view(-1)
