"""Batches that grow: one policy a file, the noise of gradients that some go by, and what carries a policy out."""

from __future__ import annotations

from disttrain.batching.adascale import AdaScale
from disttrain.batching.base import BatchPolicy, Situation
from disttrain.batching.fixed import Fixed
from disttrain.batching.growing import GrowingBatch
from disttrain.batching.noise import GradientNoise
from disttrain.batching.noise_scale import NoiseScale
from disttrain.batching.norm_test import NormTest
from disttrain.batching.plateau import Plateau
from disttrain.batching.registry import registry
from disttrain.batching.schedule import Scheduled

__all__ = [
    "AdaScale",
    "BatchPolicy",
    "Fixed",
    "GradientNoise",
    "GrowingBatch",
    "NoiseScale",
    "NormTest",
    "Plateau",
    "Scheduled",
    "Situation",
    "registry",
]
