"""The exchange of a codec in two stages, whose bytes do not grow with the number of ranks.

    all-to-all   every rank encodes its gradient in chunks, one for each rank, which averages the chunks it receives
    all-gather   every rank encodes its mean once more, and all ranks decode all means

For payloads of P1 bytes from W ranks, and P2 bytes of an encoded mean, each rank receives (W-1)/W (P1 + P2) bytes,
where an all-gather alone takes (W-1) P1. The mean is encoded as the gradients are, so that P1 = P2, or by an encoder of
its own (``mean_encoders``). The second encoding has an error feedback of its own: each rank keeps a residual of the
chunk that it averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from disttrain.collectives import AllGather, AllToAll
from disttrain.compression.base import Bucket, NewState, Program, State
from disttrain.compression.payload import Layout, Payload
from disttrain.kernels import Feedback

MEAN_RESIDUAL = "server_residual"
"""The state tensor with the residual of this rank's chunk of the mean."""

_ALIGNMENT = 4096  # elements, so that no chunk ends inside a block of any codec


class Encoder(Protocol):
    """What two stages need of a codec."""

    def encode_with_residual(
        self, grad: torch.Tensor, feedback: Feedback | None, bucket: Bucket, state: State
    ) -> Payload: ...

    def decode_mean(self, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket) -> None: ...

    def decode_mean_times(
        self, factors: torch.Tensor | None, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket
    ) -> None: ...


class MeanEncoder(Encoder, Protocol):
    """An encoder of the mean alone. The sizes of its payloads depend only on the bucket."""

    def layout(self, bucket: Bucket) -> Layout:
        """Return the layout of the payload of a bucket."""


class Chunk(NamedTuple):
    """The elements of a bucket from ``start`` to ``end``, which one rank averages. It may be empty.

    Attributes:
        bucket: the chunk as a bucket of its own.
    """

    start: int
    end: int
    bucket: Bucket

    @property
    def is_empty(self) -> bool:
        return self.start == self.end

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return these elements of a flat tensor, as a view."""
        return flat[self.start : self.end]


def split_chunks(bucket: Bucket) -> list[Chunk]:
    """Return the chunk of each rank. None is longer than the first, and the last ones may be empty."""
    length = -(-bucket.numel // bucket.world_size)
    if length > _ALIGNMENT:
        length = -(-length // _ALIGNMENT) * _ALIGNMENT
    ends = [min(bucket.numel, (rank + 1) * length) for rank in range(bucket.world_size)]
    bounds = zip([0, *ends], ends, strict=False)
    return [Chunk(*bound, bucket.part(*bound, f"chunk {index}")) for index, bound in enumerate(bounds)]


def own_chunk(bucket: Bucket) -> Chunk:
    """Return the chunk that this rank averages."""
    return split_chunks(bucket)[bucket.rank]


def add_mean_residual(state: State, bucket: Bucket) -> None:
    """Declare the residual of this rank's chunk of the mean."""
    chunk, sizes, offset = own_chunk(bucket), [], 0
    for numel in bucket.numels:
        sizes.append(max(0, min(chunk.end, offset + numel) - max(chunk.start, offset)))
        offset += numel
    zeros = torch.zeros(chunk.end - chunk.start, dtype=bucket.dtype, device=bucket.device)
    state.add(MEAN_RESIDUAL, zeros, sizes, replicated=False)


def reduce(
    codec: Encoder,
    mean_encoder: MeanEncoder | None,
    grad: torch.Tensor,
    feedback: Feedback | None,
    bucket: Bucket,
    state: State,
) -> Program:
    """Exchange ``grad`` in two stages.

    Args:
        codec: encodes the gradients.
        mean_encoder: encodes their mean; None: ``codec`` does.
        feedback: the error feedback of the gradient; None switches off that of the mean as well.

    Returns:
        The mean, and the new residual of this rank's chunk of it.
    """
    chunks = split_chunks(bucket)

    def encode(encoder: Encoder, chunk: Chunk, feedback: Feedback | None) -> Payload:
        if chunk.is_empty:
            return {"empty": grad[:0]}
        return encoder.encode_with_residual(chunk.of(grad), feedback, chunk.bucket, state)

    layouts: list[Layout] = []
    messages = []
    for chunk in chunks:
        payload = encode(codec, chunk, None if feedback is None else feedback.chunk(chunk.start, chunk.end))
        layouts.append(Layout.of(payload))
        messages.append(layouts[-1].pack(payload, layouts[0].nbytes))
    received = yield AllToAll(messages, same_size=True)
    del messages, payload

    start, end, _ = chunks[bucket.rank]
    mean = Chunk(start, end, bucket.part(start, end, "mean"))
    if not mean.is_empty:
        codec.decode_mean([layouts[bucket.rank].unpack(message) for message in received], mean.of(grad), mean.bucket)
    new_state: NewState = {}
    mean_feedback = None
    if feedback is not None:
        mean_feedback = state.feedback(MEAN_RESIDUAL)
        new_state[MEAN_RESIDUAL] = mean_feedback.new_residual
    encoder = codec
    if mean_encoder is not None:
        encoder = mean_encoder
        layouts = [Layout({}, 0) if chunk.is_empty else mean_encoder.layout(chunk.bucket) for chunk in chunks]
    packed = layouts[bucket.rank].pack(encode(encoder, mean, mean_feedback), layouts[0].nbytes)
    received = yield AllGather(packed, same_size=True)
    for message, layout, chunk in zip(received, layouts, chunks, strict=True):
        if not chunk.is_empty:
            factors = None if state.units is None else chunk.of(state.units.scale)
            encoder.decode_mean_times(factors, [layout.unpack(message)], chunk.of(grad), chunk.bucket)
    return grad, new_state
