"""Codecs: compressors that only encode and decode. Error feedback and the exchange come with the base class."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from disttrain.collectives import AllGather
from disttrain.compression import two_stage
from disttrain.compression.base import Bucket, Compressor, NewState, Program, Shapes, State
from disttrain.compression.mean_encoders import mean_encoder
from disttrain.compression.payload import Layout, Payload
from disttrain.errors import UserError
from disttrain.kernels import Feedback

__all__ = ["Codec", "FusedCodec", "Payload"]

_ROUND_BYTES = 64 * 1024  # bytes that could be received during one more round: 0.5 ms at 1 Gbit/s


class Codec(Compressor):
    """Encode, exchange, decode, and average in rank order.

    With error feedback (Karimireddy et al. 2019, arXiv:1901.09847) a rank adds to each gradient its residual, which is
    what it has not sent yet. What it has sent plus its residual is then always the sum of all its gradients.

    There are two exchanges, for payloads of P bytes from W ranks:

    * ``all_gather``: every rank receives the payloads of all others, (W-1) P bytes.
    * ``two_stage``: each rank averages one W-th of the gradient, encodes the mean again, and all-gathers that. It
      receives (W-1)/W (P + P2) bytes, however many ranks there are, at the cost of a second rounding; see
      ``two_stage``. P2 is P, or with ``mean_bits`` the size of a mean encoded by ``mean_encoders``.
    """

    min_two_stage_world_size: ClassVar[int] = 3
    """The smallest world size for which ``auto`` may choose two stages without ``mean_bits``. Larger if a second
    encoding loses much."""
    by_element: ClassVar[bool] = True
    """Whether any chunk of the bucket can be encoded by itself, which two stages need."""

    error_feedback: bool = Field(default=True, description="add what was not sent to the next gradient")
    exchange: Literal["auto", "all_gather", "two_stage"] = Field(
        default="auto", description="how payloads are exchanged; auto: what receives fewer bytes, in view of its rounds"
    )
    mean_bits: Literal[2, 3, 4, 8] | None = Field(
        default=None, description="bits an entry of the mean in two stages; null: encoded like the gradients"
    )

    @model_validator(mode="after")
    def _can_be_split(self) -> Self:
        if self.exchange == "two_stage" and not self.by_element:
            raise UserError(f"{self.name} cannot be exchanged in two stages: set exchange to auto or all_gather")
        if self.mean_bits is not None and (self.exchange == "all_gather" or not self.by_element):
            raise UserError(f"mean_bits needs two stages, in which this {self.name} is not exchanged: leave it out")
        return self

    @abstractmethod
    def encode(self, acc: torch.Tensor, bucket: Bucket, state: State) -> Payload:
        """Encode ``acc`` (bucket.numel,) as named tensors whose shapes depend only on the bucket and ``state.step``.

        Subtracts from ``acc`` what the payload decodes to; what remains there is the residual.
        """

    @abstractmethod
    def decode_add(self, payload: Payload, out: torch.Tensor, bucket: Bucket) -> None:
        """Add the decoded payload to ``out`` (bucket.numel,)."""

    # The exchange calls these. A codec with fused kernels overrides them.

    def encode_with_residual(
        self, grad: torch.Tensor, feedback: Feedback | None, bucket: Bucket, state: State
    ) -> Payload:
        """``encode`` of ``grad + residual``, which writes the new residual; without feedback, of ``grad``.

        It may overwrite ``grad``.
        """
        if feedback is None or feedback.residual is None:
            return self.encode(grad, bucket, state)
        return self.encode(torch.add(grad, feedback.residual, out=feedback.new_residual), bucket, state)

    def decode_mean(self, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket) -> None:
        """Write the mean of the decoded payloads to ``out`` (bucket.numel,)."""
        out.zero_()
        for payload in payloads:
            self.decode_add(payload, out, bucket)
        out.div_(len(payloads))

    def decode_mean_times(
        self, factors: torch.Tensor | None, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket
    ) -> None:
        """``decode_mean``, with each entry times its factor if there are any."""
        self.decode_mean(payloads, out, bucket)
        if factors is not None:
            out.mul_(factors)

    def init_state(self, bucket: Bucket) -> State:
        state = State()
        if self.error_feedback:
            state.add_zeros("residual", bucket)
            if self._takes_two_stages(bucket):
                two_stage.add_mean_residual(state, bucket)
        return state

    def num_rounds(self, bucket: Bucket) -> int:
        return 2 if self._takes_two_stages(bucket) else 1

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        feedback: Feedback | None = None
        new_state: NewState = {}
        if self.error_feedback:
            feedback = state.feedback("residual")._replace(units=state.units)
            new_state["residual"] = feedback.new_residual
        if self._takes_two_stages(bucket):
            mean, of_mean = yield from two_stage.reduce(self, self._mean_encoder, grad, feedback, bucket, state)
            return mean, new_state | of_mean
        payload = self.encode_with_residual(grad, feedback, bucket, state)
        layout = Layout.of(payload)
        received = yield AllGather(layout.pack(payload), same_size=True)
        factors = None if state.units is None else state.units.scale
        self.decode_mean_times(factors, [layout.unpack(message) for message in received], grad, bucket)
        return grad, new_state

    @property
    def _mean_encoder(self) -> two_stage.MeanEncoder | None:
        return None if self.mean_bits is None else mean_encoder(self.mean_bits)

    def _takes_two_stages(self, bucket: Bucket) -> bool:
        world_size = bucket.world_size
        if world_size == 1 or not self.by_element or self.exchange == "all_gather":
            return False
        if self.exchange == "two_stage":
            return True
        of_gradient = of_mean = self.payload_bytes(bucket)
        if (encoder := self._mean_encoder) is not None:
            of_mean = encoder.layout(bucket).nbytes
        elif world_size < self.min_two_stage_world_size:
            return False
        saved = (world_size - 1) * (of_gradient - (of_gradient + of_mean) / world_size)
        return saved > 2 * _ROUND_BYTES

    def payload_bytes(self, bucket: Bucket) -> int:
        """Return the size of one payload at step 0, found by encoding zeros once for each size and dtype."""
        return _payload_bytes(self, ((bucket.numel,),) if self.by_element else bucket.shapes, bucket.dtype)


class FusedCodec(Codec):
    """A codec with kernels that encode and apply error feedback in one pass, and decode all payloads in one."""

    def encode(self, acc: torch.Tensor, bucket: Bucket, state: State) -> Payload:
        return self.encode_with_residual(acc, Feedback.in_place(acc), bucket, state)

    def decode_add(self, payload: Payload, out: torch.Tensor, bucket: Bucket) -> None:
        self.decode_mean([payload], out, bucket, add=True)

    @abstractmethod
    def encode_with_residual(
        self, grad: torch.Tensor, feedback: Feedback | None, bucket: Bucket, state: State
    ) -> Payload: ...

    @abstractmethod
    def decode_mean(
        self, payloads: Sequence[Payload], out: torch.Tensor, bucket: Bucket, *, add: bool = False
    ) -> None: ...


@functools.lru_cache(maxsize=1024)
def _payload_bytes(codec: Codec, shapes: Shapes, dtype: torch.dtype) -> int:
    names = tuple(str(index) for index in range(len(shapes)))
    bucket = Bucket(names, shapes, dtype, torch.device("cpu"))
    zeros = torch.zeros(bucket.numel, dtype=dtype)
    return Layout.of(codec.encode(zeros, bucket, codec.init_state(bucket))).nbytes
