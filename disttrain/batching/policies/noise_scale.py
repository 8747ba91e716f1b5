"""Grow the batch to the noise scale of the gradient."""

from __future__ import annotations

from pydantic import Field

from disttrain.batching.policies.base import NoisePolicy, PolicyInputs


class NoiseScale(NoisePolicy):
    """Multiply by ``growth`` as soon as that is no more than ``share`` of the noise scale tr(S) / |G|^2.

    Up to the noise scale, a batch twice as large saves nearly half of the steps; beyond, it saves few (McCandlish et
    al. 2018, arXiv:1812.06162). It grows by one factor at a time, since the scale is an estimate.
    """

    growth: float = Field(default=2.0, gt=1, description="what the batch is multiplied by")
    share: float = Field(default=1.0, gt=0, description="of the noise scale, which the batch is to stay below")

    def wanted(self, situation: PolicyInputs) -> float:
        larger = situation.batch_size * self.growth
        return larger if larger <= self.share * situation.noise.scale else situation.batch_size
