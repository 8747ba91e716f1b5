"""Batches that grow during training: policies, the gradient noise that some of them use, and their execution."""

from __future__ import annotations

from disttrain.batching.gradient_noise import GradientNoise
from disttrain.batching.growing import GrowingBatch
from disttrain.batching.policies import AdaScale, BatchPolicy, PolicyInputs, registry

__all__ = ["AdaScale", "BatchPolicy", "GradientNoise", "GrowingBatch", "PolicyInputs", "registry"]
