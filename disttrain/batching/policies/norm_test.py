"""Grow the batch until its gradient points the right way."""

from __future__ import annotations

from pydantic import Field

from disttrain.batching.policies.base import NoisePolicy, PolicyInputs


class NormTest(NoisePolicy):
    """If tr(S) / B > theta^2 |g|^2, where g is the gradient of the batch, grow to B = tr(S) / (theta^2 |g|^2).

    So the error of the gradient stays below ``theta`` times its norm: a direction of descent (Byrd et al. 2012, "Sample
    size selection in optimization methods for machine learning"). The two norms are smoothed ones.
    """

    theta: float = Field(default=0.9, gt=0, lt=1, description="the smaller, the sooner the batch grows")

    def wanted(self, situation: PolicyInputs) -> float:
        noise = situation.noise
        square = noise.square_norm + noise.trace / situation.batch_size  # of the batch's gradient, noise included
        return noise.trace / (self.theta**2 * square) if square > 0 else situation.batch_size
