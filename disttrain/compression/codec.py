"""Compressors that only encode and decode: the exchange and the error feedback come with this base."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TypeAlias

import torch
from pydantic import Field

from disttrain.collectives import AllGather
from disttrain.compression.base import Bucket, Compressor, Program, State

Payload: TypeAlias = Mapping[str, torch.Tensor]

_ALIGNMENT = 16  # bytes; so that every section can be viewed in its own dtype


class Codec(Compressor):
    """Encode, all-gather, decode and add in rank order.

    What a rank receives grows with the number of workers: (W-1) payloads.

    With error feedback (Karimireddy et al. 2019, arXiv:1901.09847) a rank adds to each gradient what it has not sent
    yet; what is sent plus the residual is then always the sum of all its gradients.
    """

    error_feedback: bool = Field(default=True, description="add what was not sent to the next gradient")

    @abstractmethod
    def encode(self, acc: torch.Tensor, bucket: Bucket, state: State) -> Payload:
        """Turn ``acc`` (bucket.numel,) into named tensors whose shapes depend on the bucket alone.

        Takes out of ``acc`` what the payload will decode to; what stays there is the residual.
        """

    @abstractmethod
    def decode_add(self, payload: Payload, out: torch.Tensor, bucket: Bucket) -> None:
        """Add what the payload stands for to ``out`` (bucket.numel,)."""

    def init_state(self, bucket: Bucket) -> State:
        state = State()
        if self.error_feedback:
            residual = torch.zeros(bucket.numel, dtype=bucket.dtype, device=bucket.device)
            state.add("residual", residual, bucket.numels, replicated=False)
        return state

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        acc = grad.add_(state.residual) if self.error_feedback else grad
        payload = self.encode(acc, bucket, state)
        packed = yield AllGather(pack(payload), same_size=True)
        mean = torch.zeros_like(acc)
        for part in packed:
            self.decode_add(unpack(part, payload), mean, bucket)
        return mean.div_(bucket.world_size), {"residual": acc} if self.error_feedback else {}


def pack(payload: Payload) -> torch.Tensor:
    """All sections in one uint8 tensor, so that a payload is one message. Each starts at a multiple of 16 bytes."""
    device = next(iter(payload.values())).device
    packed = torch.zeros(sum(_padded(section.nbytes) for section in payload.values()), dtype=torch.uint8, device=device)
    offset = 0
    for section in payload.values():
        packed[offset : offset + section.nbytes] = section.contiguous().view(-1).view(torch.uint8)
        offset += _padded(section.nbytes)
    return packed


def unpack(packed: torch.Tensor, like: Payload) -> dict[str, torch.Tensor]:
    """The sections of a packed payload, as views, in the shapes and dtypes of another payload of the same bucket."""
    sections, offset = {}, 0
    for name, section in like.items():
        sections[name] = packed[offset : offset + section.nbytes].view(section.dtype).view(section.shape)
        offset += _padded(section.nbytes)
    return sections


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
