"""Top-k: send the k entries of largest magnitude (Stich et al. 2018, arXiv:1809.07599)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from disttrain.compression.algorithms.sparse import SparseCodec, num_kept, room_for
from disttrain.compression.base import Bucket, State
from disttrain.compression.codec import Payload
from disttrain.compression.ramp import RatioRamp
from disttrain.errors import UserError
from disttrain.kernels import Chunks, Entries, Feedback, for_device


class TopK(SparseCodec):
    """Send the entries of a bucket that are largest in magnitude, a share of ``ratio``, as values and int32 indices.

    A contraction: ||x - C(x)||^2 <= (1 - k/d) ||x||^2. Biased, so error feedback is on by default.
    Wire: k (4 + value size) bytes a rank, all-gathered.

    ``selection="estimated"`` sends the entries above a threshold estimated from a sample, as DGC's authors do: about k
    entries (0.8 to 1.25 k for usual distributions), without a search for the k-th. The payload has room for 1.25 k and
    is padded with zeros. The bound above then holds with the number of entries that were sent.

    ``chunk_size`` takes the largest entries of each chunk of so many instead, so that an index needs only 12 bits.
    A chunk of c entries sends max(1, round(ratio c)) of them, and so does a shorter one at the end with its own c; the
    bound above holds in each chunk. ``value_bits`` rounds values: 16 to bfloat16, since float16 has neither the range
    for large gradients nor for small ones; 2, 4 and 8 to a sign and an even grid from the smallest to the largest
    magnitude sent of the chunk, which two scales describe. What is rounded off stays in the residual, and no value is
    rounded by more than itself. Wire: k (12 + value_bits)/8 bytes a rank, and two values a chunk if values have 8 bits
    or fewer; k indices, or values, that do not fill whole bytes are padded.
    """

    name = "topk"
    # The mean of W payloads has up to W k entries, of which a second encoding keeps only k.
    min_two_stage_world_size: ClassVar[int] = 32

    ratio: float = Field(default=0.01, gt=0, le=1, description="share of the entries that is sent each step")
    ratio_ramp: RatioRamp | None = Field(default=None, description="start and steps of a ramp to `ratio`")
    selection: Literal["exact", "estimated"] = Field(
        default="exact", description="exactly k entries, or all above a threshold estimated from a sample"
    )
    chunk_size: int | None = Field(
        default=None,
        ge=16,
        le=4096,
        multiple_of=16,
        description="entries among which the largest are taken; null: those of the bucket",
    )
    value_bits: Literal[2, 4, 8, 16] | None = Field(
        default=None, description="bits of a value, sign included, with a chunk_size; null: those of the gradient"
    )

    @model_validator(mode="after")
    def _packs_chunks_of_exact_size(self) -> Self:
        if self.value_bits is not None and self.chunk_size is None:
            raise UserError("topk with value_bits needs a chunk_size, such as 4096")
        if self.selection == "estimated" and self.chunk_size is not None:
            raise UserError("topk with a chunk_size needs selection=exact: chunks are too small for an estimate")
        return self

    def encode_with_residual(
        self, grad: torch.Tensor, feedback: Feedback | None, bucket: Bucket, state: State
    ) -> Payload:
        assert grad.numel() < 2**31, "indices are int32"
        ratio = self.ratio if self.ratio_ramp is None else self.ratio_ramp.at(state.step, self.ratio)
        if self.chunk_size is not None:
            return self._encode_chunks(grad, feedback, ratio, self.chunk_size)
        k = num_kept(ratio, grad.numel())
        kernels = for_device(grad.device)
        if self.selection == "exact":
            values, indices = kernels.take_largest(grad, feedback, k)
        else:
            threshold = kernels.estimate_threshold(grad, feedback, k / grad.numel())
            values, indices, _ = kernels.take_above(grad, feedback, threshold, room_for(k, grad.numel()))
        return {"values": values, "indices": indices}

    def _encode_chunks(self, grad: torch.Tensor, feedback: Feedback | None, ratio: float, size: int) -> Payload:
        chunks = Chunks(size, num_kept(ratio, size), num_kept(ratio, grad.numel() % size))
        entries = for_device(grad.device).take_largest_of_chunks(grad, feedback, chunks, self.value_bits)
        # Payloads carry shapes at no cost in bytes. This one tells the decoder, which knows no step, how many entries
        # of each chunk the ramp has reached.
        kept = grad.new_empty(chunks.kept, chunks.kept_of_rest, 0)
        return {**entries._asdict(), "kept": kept}

    def decode_mean(self, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket, *, add: bool = False) -> None:
        if self.chunk_size is None:
            super().decode_mean(payloads, out, bucket, add=add)
            return
        chunks = Chunks(self.chunk_size, *payloads[0]["kept"].shape[:2])
        parts = [Entries(*(payload[name] for name in Entries._fields)) for payload in payloads]
        for_device(out.device).chunks_mean(parts, chunks, self.value_bits, out, add=add)
