"""Grow the batch up to the noise scale of the gradient."""

from __future__ import annotations

from pydantic import Field

from disttrain.batching.policies.base import NoisePolicy, PolicyInputs


class NoiseScale(NoisePolicy):
    """Multiplies the batch by ``growth`` if the result is at most ``share`` of the noise scale tr(S) / |G|^2.

    Below the noise scale, twice the batch nearly halves the number of steps; above it, the number hardly falls
    (McCandlish et al. 2018, arXiv:1812.06162). The batch grows by one factor at a time, since the scale is an estimate.
    """

    growth: float = Field(default=2.0, gt=1, description="what the batch is multiplied by")
    share: float = Field(default=1.0, gt=0, description="fraction of the noise scale that the batch may grow to")

    def size_for_noise(self, inputs: PolicyInputs) -> float:
        larger = inputs.batch_size * self.growth
        return larger if larger <= self.share * inputs.noise.scale else inputs.batch_size
