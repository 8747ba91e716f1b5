"""Random-k: send k entries at places that all ranks draw alike (Stich et al. 2018, arXiv:1809.07599)."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from disttrain.collectives import AllReduce
from disttrain.compression.algorithms.sparse import num_kept
from disttrain.compression.base import Bucket, Compressor, Program, State
from disttrain.errors import UserError


class RandomK(Compressor):
    """Send ``ratio`` of a bucket's entries, at other random places each step; the seed is shared, so no index is sent.

    Linear, so values are all-reduced: k value sizes on the wire, whatever the number of ranks. As it is a contraction,
    E||x - C(x)||^2 = (1 - k/d) ||x||^2, biased, with error feedback. ``scaled`` by d/k it is unbiased instead, with
    E||Q(x) - x||^2 = (d/k - 1) ||x||^2.

    Differs in the draw: one place in each of k strata, their grid shifted by a random number, in place of k draws from
    all. Every entry still has probability k/d, no set of d numbers is shuffled, and memory is read in order.
    """

    name = "randomk"

    ratio: float = Field(default=0.01, gt=0, le=1, description="share of the entries that is sent each step")
    error_feedback: bool = Field(default=True, description="add what was not sent to the next gradient")
    scaled: bool = Field(default=False, description="multiply by d/k: unbiased; needs error_feedback=false")
    seed: int = Field(default=0, description="of the places, equal on all ranks")

    @model_validator(mode="after")
    def _scales_only_without_feedback(self) -> Self:
        if self.scaled and self.error_feedback:
            raise UserError(
                "randomk with scaled=true must have error_feedback=false: what is scaled leaves no right residual"
            )
        return self

    def init_state(self, bucket: Bucket) -> State:
        state = State()
        if self.error_feedback:
            state.add_zeros("residual", bucket)
        return state

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        places, kept = self._draw(bucket, state.step), {}
        if self.error_feedback:
            rest = torch.add(grad, state.residual, out=state.scratch("residual"))
            values = rest[places]
            rest[places] = 0
            kept["residual"] = rest
        else:
            values = grad[places]
        if self.scaled:
            values *= bucket.numel / places.numel()
        mean = yield AllReduce(values, op="mean")
        grad.zero_()[places] = mean
        return grad, kept

    def _draw(self, bucket: Bucket, step: int) -> torch.Tensor:
        """k places, all different."""
        numel, device = bucket.numel, bucket.device
        k = num_kept(self.ratio, numel)
        generator = bucket.generator(self.seed, step, per_rank=False)
        starts = torch.arange(k + 1, device=device) * numel // k
        # float64 holds every place exactly; float32 would miss the odd ones from 2^24 on.
        shares = torch.rand(k, generator=generator, device=device, dtype=torch.float64)
        places = starts[:-1] + (shares * starts.diff()).long()
        # Strata differ in length by one. With the shift, the share of each place comes out as k/d all the same.
        shift = torch.randint(numel, (1,), generator=generator, device=device)
        return (places + shift).remainder_(numel)
