"""Compressors that only encode and decode: error feedback and the exchange come with this base."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, TypeAlias

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from disttrain.collectives import AllGather, AllToAll
from disttrain.compression.base import Bucket, Compressor, Program, State
from disttrain.errors import UserError

Payload: TypeAlias = Mapping[str, torch.Tensor]

_ALIGNMENT = 16  # bytes; so that every section can be viewed in its own dtype
_CHUNK_ALIGNMENT = 4096  # elements; a chunk's end does not cut a block of any codec
_ROUND_BYTES = 64 * 1024  # what one more round of messages costs, in bytes not received: 0.5 ms at 1 Gbit/s


class Codec(Compressor):
    """Encode, exchange, decode and average in rank order.

    With error feedback (Karimireddy et al. 2019, arXiv:1901.09847) a rank adds to each gradient what it has not sent
    yet; what is sent plus the residual is then always the sum of all its gradients.

    Two exchanges, for payloads of P bytes from W ranks:

    * ``all_gather``: everyone receives everyone's payload, (W-1) P bytes.
    * ``two_stage``: each rank averages one W-th of the gradient (all-to-all), encodes the mean again with an error
      feedback of its own, and all-gathers that: 2 (W-1)/W P bytes, however many ranks there are, for a second rounding.
    """

    min_two_stage_world_size: ClassVar[int] = 3
    """From how many ranks on ``auto`` may choose two stages; more for codecs whose second encoding loses much."""
    by_element: ClassVar[bool] = True
    """Whether any stretch of the bucket can be encoded by itself, as two stages need."""

    error_feedback: bool = Field(default=True, description="add what was not sent to the next gradient")
    exchange: Literal["auto", "all_gather", "two_stage"] = Field(
        default="auto", description="how payloads travel; auto takes what receives fewer bytes for its rounds"
    )

    @model_validator(mode="after")
    def _can_be_cut(self) -> Self:
        if self.exchange == "two_stage" and not self.by_element:
            raise UserError(f"{self.name} cannot be exchanged in two stages: set exchange to auto or all_gather")
        return self

    @abstractmethod
    def encode(self, acc: torch.Tensor, bucket: Bucket, state: State) -> Payload:
        """Turn ``acc`` (bucket.numel,) into named tensors whose shapes depend on the bucket and ``state.step`` alone.

        Takes out of ``acc`` what the payload will decode to; what stays there is the residual.
        """

    @abstractmethod
    def decode_add(self, payload: Payload, out: torch.Tensor, bucket: Bucket) -> None:
        """Add what the payload stands for to ``out`` (bucket.numel,)."""

    # The two that the exchange calls. A codec with fused kernels overrides them.

    def encode_owed(
        self, grad: torch.Tensor, residual: torch.Tensor | None, rest: torch.Tensor | None, bucket: Bucket, state: State
    ) -> Payload:
        """``encode`` of ``grad + residual``, leaving the new residual in ``rest`` (None: it is not kept)."""
        if rest is None:
            return self.encode(grad, bucket, state)
        assert residual is not None
        return self.encode(torch.add(grad, residual, out=rest), bucket, state)

    def decode_mean(self, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket) -> None:
        """Write the mean of what the payloads stand for to ``out`` (bucket.numel,)."""
        out.zero_()
        for payload in payloads:
            self.decode_add(payload, out, bucket)
        out.div_(len(payloads))

    def init_state(self, bucket: Bucket) -> State:
        state = State()
        if self.error_feedback:
            state.add_zeros("residual", bucket)
            if self._takes_two_stages(bucket):
                start, end = chunk_of(bucket)
                sizes = _overlaps(bucket.numels, start, end)
                owed = torch.zeros(end - start, dtype=bucket.dtype, device=bucket.device)
                state.add("server_residual", owed, sizes, replicated=False)
        return state

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        residual, rest = (state.residual, state.scratch("residual")) if self.error_feedback else (None, None)
        kept = {} if rest is None else {"residual": rest}
        if self._takes_two_stages(bucket):
            return (yield from self._two_stages(grad, residual, rest, kept, bucket, state))
        payload = self.encode_owed(grad, residual, rest, bucket, state)
        packed = yield AllGather(pack(payload), same_size=True)
        self.decode_mean([unpack(part, payload) for part in packed], grad, bucket)
        return grad, kept

    def _two_stages(
        self,
        grad: torch.Tensor,
        residual: torch.Tensor | None,
        rest: torch.Tensor | None,
        kept: dict[str, torch.Tensor],
        bucket: Bucket,
        state: State,
    ) -> Program:
        chunks = _chunks(bucket)
        parts = [bucket.part(start, end, f"chunk {index}") for index, (start, end) in enumerate(chunks)]
        payloads: list[Payload] = []
        nothing: Payload = {"nothing": grad[:0]}
        for part, (start, end) in zip(parts, chunks, strict=True):
            owed, left = (None if tensor is None else tensor[start:end] for tensor in (residual, rest))
            payloads.append(self.encode_owed(grad[start:end], owed, left, part, state) if end > start else nothing)
        size = packed_bytes(payloads[0])  # no chunk is larger than the first
        received = yield AllToAll([pack(payload, size) for payload in payloads], same_size=True)

        start, end = chunks[bucket.rank]
        own, owned = grad[start:end], bucket.part(start, end, "mean")
        payload = nothing
        if end > start:
            self.decode_mean([unpack(part, payloads[bucket.rank]) for part in received], own, owned)
            owed, left = (
                (state.server_residual, state.scratch("server_residual")) if self.error_feedback else (None, None)
            )
            payload = self.encode_owed(own, owed, left, owned, state)
            if left is not None:
                kept["server_residual"] = left
        packed = yield AllGather(pack(payload, size), same_size=True)
        for part, (start, end), sent, like in zip(packed, chunks, payloads, parts, strict=True):
            if end > start:
                self.decode_mean([unpack(part, sent)], grad[start:end], like)
        return grad, kept

    def _takes_two_stages(self, bucket: Bucket) -> bool:
        world_size = bucket.world_size
        if self.exchange != "auto" or not self.by_element or world_size < self.min_two_stage_world_size:
            return self.exchange == "two_stage" and world_size > 1
        saved = (world_size - 1) * (1 - 2 / world_size) * self.payload_bytes(bucket)
        return saved > 2 * _ROUND_BYTES

    def payload_bytes(self, bucket: Bucket) -> int:
        """Bytes of one payload. Found by encoding zeros, once for each size and dtype."""
        key = (self, bucket.numel, bucket.shapes if not self.by_element else (), bucket.dtype)
        if key not in _payload_bytes:
            zeros = torch.zeros(bucket.numel, dtype=bucket.dtype)
            like = Bucket(bucket.names, bucket.shapes, bucket.dtype, zeros.device)
            _payload_bytes[key] = packed_bytes(self.encode(zeros, like, self.init_state(like)))
        return _payload_bytes[key]


class FusedCodec(Codec):
    """A codec whose kernels add the residual, encode and keep the rest in one pass, and decode all payloads in one."""

    def encode(self, acc: torch.Tensor, bucket: Bucket, state: State) -> Payload:
        return self.encode_owed(acc, None, acc, bucket, state)

    def decode_add(self, payload: Payload, out: torch.Tensor, bucket: Bucket) -> None:
        self.decode_mean([payload], out, bucket, add=True)

    @abstractmethod
    def encode_owed(
        self, grad: torch.Tensor, residual: torch.Tensor | None, rest: torch.Tensor | None, bucket: Bucket, state: State
    ) -> Payload: ...

    @abstractmethod
    def decode_mean(
        self, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket, *, add: bool = False
    ) -> None: ...


_payload_bytes: dict[object, int] = {}


def _chunks(bucket: Bucket) -> list[tuple[int, int]]:
    """(start, end) of the stretch that each rank averages; the last ones may be empty."""
    length = -(-bucket.numel // bucket.world_size)
    if length > _CHUNK_ALIGNMENT:
        length = -(-length // _CHUNK_ALIGNMENT) * _CHUNK_ALIGNMENT
    ends = [min(bucket.numel, (rank + 1) * length) for rank in range(bucket.world_size)]
    return list(zip([0, *ends], ends, strict=False))


def chunk_of(bucket: Bucket) -> tuple[int, int]:
    """(start, end) of what this rank averages where payloads travel in two stages."""
    return _chunks(bucket)[bucket.rank]


def _overlaps(numels: Sequence[int], start: int, end: int) -> list[int]:
    """How many elements of each parameter lie between start and end."""
    sizes, offset = [], 0
    for numel in numels:
        sizes.append(max(0, min(end, offset + numel) - max(start, offset)))
        offset += numel
    return sizes


def packed_bytes(payload: Payload) -> int:
    return sum(_padded(section.nbytes) for section in payload.values())


def pack(payload: Payload, size: int | None = None) -> torch.Tensor:
    """All sections in one uint8 tensor, so that a payload is one message. Each starts at a multiple of 16 bytes.

    ``size`` is that of the message if it is to be longer, in bytes.
    """
    size = packed_bytes(payload) if size is None else size
    packed = torch.empty(size, dtype=torch.uint8, device=next(iter(payload.values())).device)
    offset = 0
    for section in payload.values():
        end = offset + section.nbytes
        packed[offset:end] = section.contiguous().view(-1).view(torch.uint8)
        offset += _padded(section.nbytes)
        packed[end:offset] = 0
    packed[offset:] = 0
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
