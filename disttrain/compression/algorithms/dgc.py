"""DGC: Deep Gradient Compression, top-k of locally accumulated momentum (Lin et al. 2018, arXiv:1712.01887)."""

from __future__ import annotations

import torch
from pydantic import Field

from disttrain.collectives import AllGather
from disttrain.compression.algorithms.sparse import num_kept
from disttrain.compression.base import Bucket, Compressor, Program, State
from disttrain.compression.payload import Layout
from disttrain.kernels import for_device

_WARM_UP = (0.25, 0.0625, 0.015625, 0.004)


class DGC(Compressor):
    """Every rank runs momentum SGD on its own gradients and sends the largest entries of what it has not sent yet.

    u <- m u + g; v <- v + u; send the k largest of v, keep the others. (Nesterov: u <- m (u + g); v <- v + u + g.)
    With masking, entries of u that are sent are set to zero as well, so that momentum does not carry stale gradients.
    The result already includes momentum: **use plain SGD without momentum outside**, or it counts twice.

    The authors use ratio 0.001, momentum 0.9, masking, and a warmup over the first 4 epochs. With masking, an entry
    that is sent every step has no momentum: switch it off at high ratios. Wire: k (4 + value size) bytes a rank,
    all-gathered. Differs from the paper in the norm that is clipped (of a bucket, not of the model) and in the code:
    int32 indices instead of run lengths, exact top-k instead of a sampled threshold.
    """

    name = "dgc"

    ratio: float = Field(default=0.001, gt=0, le=1, description="share of the entries that is sent each step")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of the local momentum")
    nesterov: bool = Field(default=False, description="Nesterov momentum")
    masking: bool = Field(default=True, description="momentum factor masking: forget the momentum of what was sent")
    clip_norm: float | None = Field(
        default=None, gt=0, description="norm to which a bucket's mean gradient is clipped; a rank's to 1/sqrt(W) of it"
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="steps over which the ratio falls: 25 %, 6.25 %, 1.6 %, 0.4 %, then `ratio`"
    )

    def init_state(self, bucket: Bucket) -> State:
        state = State()
        state.add_zeros("momentum", bucket)
        state.add_zeros("velocity", bucket, is_residual=True)
        return state

    def ratio_at(self, step: int) -> float:
        """Return the share of the entries that a step sends."""
        if step >= self.warmup_steps:
            return self.ratio
        return max(self.ratio, _WARM_UP[step * len(_WARM_UP) // self.warmup_steps])

    def num_rounds(self, bucket: Bucket) -> int:
        return 1

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        assert grad.numel() < 2**31, "indices are int32"
        self._clip(grad, bucket.world_size)
        momentum = state.scratch("momentum")
        if self.nesterov:
            torch.add(state.momentum, grad, out=momentum).mul_(self.momentum)
            grad += momentum
        else:
            torch.add(grad, state.momentum, alpha=self.momentum, out=momentum)
        k = num_kept(self.ratio_at(state.step), grad.numel())
        kernels = for_device(grad.device)
        feedback = state.feedback("velocity")
        values, indices = kernels.take_largest(grad if self.nesterov else momentum, feedback, k)
        if self.masking:
            momentum[indices.long()] = 0

        payload = {"values": values, "indices": indices}
        layout = Layout.of(payload)
        received = yield AllGather(layout.pack(payload), same_size=True)
        payloads = [layout.unpack(message) for message in received]
        kernels.sparse_mean([part["values"] for part in payloads], [part["indices"] for part in payloads], grad)
        return grad, {"momentum": momentum, "velocity": feedback.new_residual}

    def _clip(self, grad: torch.Tensor, world_size: int) -> None:
        if self.clip_norm is None:
            return
        # In float64, so that squares of float32 numbers cannot overflow.
        norm = float(torch.linalg.vector_norm(grad, dtype=torch.float64))
        bound = self.clip_norm / world_size**0.5
        if norm > bound:
            grad.mul_(bound / norm)
