"""Grow the batch until its gradient is accurate enough."""

from __future__ import annotations

from pydantic import Field

from disttrain.batching.policies.base import NoisePolicy, PolicyInputs


class NormTest(NoisePolicy):
    """Grows the batch B to tr(S) / (theta^2 |g|^2) if tr(S) / B > theta^2 |g|^2, with the batch's gradient g.

    The error of the gradient then stays below ``theta`` times its norm, which makes it a descent direction (Byrd et al.
    2012, "Sample size selection in optimization methods for machine learning"). Both norms are smoothed.
    """

    theta: float = Field(
        default=0.9, gt=0, lt=1, description="bound of the gradient's relative error; lower: the batch grows earlier"
    )

    def size_for_noise(self, inputs: PolicyInputs) -> float:
        noise = inputs.noise
        squared_norm = noise.square_norm + noise.trace / inputs.batch_size  # of the batch's gradient, noise included
        return noise.trace / (self.theta**2 * squared_norm) if squared_norm > 0 else inputs.batch_size
