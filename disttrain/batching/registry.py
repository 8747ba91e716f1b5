"""Batch policies by name: the config's ``batch:`` section."""

from __future__ import annotations

from disttrain.batching.adascale import AdaScale
from disttrain.batching.base import BatchPolicy
from disttrain.batching.fixed import Fixed
from disttrain.batching.noise_scale import NoiseScale
from disttrain.batching.norm_test import NormTest
from disttrain.batching.plateau import Plateau
from disttrain.batching.schedule import Scheduled
from disttrain.validation import Registry

registry: Registry[BatchPolicy] = Registry(
    "batch",
    BatchPolicy,  # type: ignore[type-abstract]
    {
        "fixed": Fixed,
        "schedule": Scheduled,
        "plateau": Plateau,
        "noise_scale": NoiseScale,
        "norm_test": NormTest,
        "adascale": AdaScale,
    },
)
