"""Batches that grow during training, by a policy that may depend on the gradient noise.

``policies`` decide when to grow. ``GradientNoise`` estimates the noise, and ``GrowingBatch`` applies a policy.
"""

from __future__ import annotations

from disttrain.batching.gradient_noise import GradientNoise
from disttrain.batching.growing import GrowingBatch
from disttrain.batching.policies import AdaScale, BatchPolicy, PolicyInputs, registry

__all__ = ["AdaScale", "BatchPolicy", "GradientNoise", "GrowingBatch", "PolicyInputs", "registry"]
