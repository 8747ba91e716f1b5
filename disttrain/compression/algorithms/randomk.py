"""Random-k: send k entries at indices that are the same on all ranks (Stich et al. 2018, arXiv:1809.07599)."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from disttrain.collectives import AllReduce
from disttrain.compression.algorithms.sparse import num_kept
from disttrain.compression.base import Bucket, Compressor, Program, State
from disttrain.errors import UserError


class RandomK(Compressor):
    """Send ``ratio`` of a bucket's entries, chosen at random each step. The seed is shared, so no index is sent.

    Linear, so the values are all-reduced: k value sizes on the wire, for any number of ranks. A contraction with
    E||x - C(x)||^2 = (1 - k/d) ||x||^2, biased, with error feedback. ``scaled`` by d/k it is unbiased instead, with
    E||Q(x) - x||^2 = (d/k - 1) ||x||^2.

    Differs from the paper in the draw: one index from each of k strata, shifted by a random number, instead of k draws
    from all indices. Every entry still has probability k/d, no d numbers are shuffled, and memory is read in order.
    """

    name = "randomk"

    ratio: float = Field(default=0.01, gt=0, le=1, description="share of the entries that is sent each step")
    error_feedback: bool = Field(default=True, description="add what was not sent to the next gradient")
    scaled: bool = Field(default=False, description="multiply by d/k: unbiased; needs error_feedback=false")
    seed: int = Field(default=0, description="of the random indices, the same on all ranks")

    @model_validator(mode="after")
    def _scales_only_without_feedback(self) -> Self:
        if self.scaled and self.error_feedback:
            raise UserError(
                "randomk with scaled=true needs error_feedback=false: scaled entries leave no meaningful residual"
            )
        return self

    def init_state(self, bucket: Bucket) -> State:
        state = State()
        if self.error_feedback:
            state.add_zeros("residual", bucket)
        return state

    def num_rounds(self, bucket: Bucket) -> int:
        return 1

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        indices, new_state = self._draw(bucket, state.step), {}
        if self.error_feedback:
            total = torch.add(grad, state.residual, out=state.scratch("residual"))
            values = total[indices]
            total[indices] = 0
            new_state["residual"] = total
        else:
            values = grad[indices]
        if self.scaled:
            values *= bucket.numel / indices.numel()
        mean = yield AllReduce(values, op="mean")
        grad.zero_()[indices] = mean
        return grad, new_state

    def _draw(self, bucket: Bucket, step: int) -> torch.Tensor:
        """Draw k distinct indices."""
        numel, device = bucket.numel, bucket.device
        k = num_kept(self.ratio, numel)
        generator = bucket.generator(self.seed, step, per_rank=False)
        starts = torch.arange(k + 1, device=device) * numel // k
        # float64 represents every index exactly; float32 would miss the odd ones from 2^24 on.
        shares = torch.rand(k, generator=generator, device=device, dtype=torch.float64)
        indices = starts[:-1] + (shares * starts.diff()).long()
        # The lengths of strata differ by one. The shift still gives every index the probability k/d.
        shift = torch.randint(numel, (1,), generator=generator, device=device)
        return (indices + shift).remainder_(numel)
