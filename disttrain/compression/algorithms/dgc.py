"""DGC: Deep Gradient Compression, top-k of locally accumulated momentum (Lin et al. 2018, arXiv:1712.01887)."""

from __future__ import annotations

import torch
from pydantic import Field

from disttrain.collectives import AllGather
from disttrain.compression.algorithms.sparse import num_kept
from disttrain.compression.base import Bucket, Compressor, Program, State
from disttrain.compression.codec import pack, unpack
from disttrain.kernels import for_device

_WARM_UP = (0.25, 0.0625, 0.015625, 0.004)


class DGC(Compressor):
    """Every rank runs momentum SGD on its own gradients and sends the largest entries of what it has not applied yet.

    u <- m u + g; v <- v + u; send the k largest of v, keep the others. (Nesterov: u <- m (u + g); v <- v + u + g.)
    With masking, u too forgets the entries sent, so that momentum does not carry stale gradients on. What is returned
    holds the momentum already: **use plain SGD without momentum outside**, or it counts twice.

    Authors' settings: ratio 0.001, momentum 0.9, masking; warm-up over the first 4 epochs. Masked, the momentum of an
    entry that is sent every step is nil: at high ratios leave masking off. Wire: k (4 + value size) bytes a rank,
    all-gathered. Differs in the norm that is clipped, a bucket's in place of the model's, and in the code: int32
    indices in place of run lengths, exact top-k in place of a sampled threshold.
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
        """The share that is sent at a step."""
        if step >= self.warmup_steps:
            return self.ratio
        return max(self.ratio, _WARM_UP[step * len(_WARM_UP) // self.warmup_steps])

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        assert grad.numel() < 2**31, "indices are int32"
        self._clip(grad, bucket.world_size)
        momentum, velocity = state.scratch("momentum"), state.scratch("velocity")
        if self.nesterov:
            torch.add(state.momentum, grad, out=momentum).mul_(self.momentum)
            grad += momentum
        else:
            torch.add(grad, state.momentum, alpha=self.momentum, out=momentum)
        k = num_kept(self.ratio_at(state.step), grad.numel())
        kernels = for_device(grad.device)
        values, indices = kernels.take_largest(grad if self.nesterov else momentum, state.velocity, velocity, k)
        if self.masking:
            momentum[indices.long()] = 0

        payload = {"values": values, "indices": indices}
        packed = yield AllGather(pack(payload), same_size=True)
        payloads = [unpack(part, payload) for part in packed]
        kernels.sparse_mean([part["values"] for part in payloads], [part["indices"] for part in payloads], grad)
        return grad, {"momentum": momentum, "velocity": velocity}

    def _clip(self, grad: torch.Tensor, world_size: int) -> None:
        if self.clip_norm is None:
            return
        # In float64, which the squares of float32 cannot leave.
        norm = float(torch.linalg.vector_norm(grad, dtype=torch.float64))
        bound = self.clip_norm / world_size**0.5
        if norm > bound:
            grad.mul_(bound / norm)
