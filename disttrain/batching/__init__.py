"""Batches that grow during training, by a policy that may depend on the gradient noise.

``policies`` decide when to grow. ``GradientNoise`` estimates the noise, and ``GrowingBatch`` applies a policy.
"""

from __future__ import annotations

from disttrain.batching.gradient_noise import GradientNoise
from disttrain.batching.growing import GrowingBatch
from disttrain.batching.policies.adascale import AdaScale
from disttrain.batching.policies.base import BatchPolicy, PolicyInputs
from disttrain.batching.policies.fixed import Fixed
from disttrain.batching.policies.noise_scale import NoiseScale
from disttrain.batching.policies.norm_test import NormTest
from disttrain.batching.policies.plateau import Plateau
from disttrain.batching.policies.registry import registry
from disttrain.batching.policies.schedule import Scheduled

__all__ = [
    "AdaScale",
    "BatchPolicy",
    "Fixed",
    "GradientNoise",
    "GrowingBatch",
    "NoiseScale",
    "NormTest",
    "Plateau",
    "PolicyInputs",
    "Scheduled",
    "registry",
]
