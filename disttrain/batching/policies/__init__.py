"""Batch policies by name, one per file: the config's ``batch:`` section.

To add a policy, write a subclass of ``BatchPolicy`` and list it here.
"""

from __future__ import annotations

from disttrain.batching.policies.adascale import AdaScale
from disttrain.batching.policies.base import BatchPolicy, PolicyInputs
from disttrain.batching.policies.fixed import Fixed
from disttrain.batching.policies.noise_scale import NoiseScale
from disttrain.batching.policies.norm_test import NormTest
from disttrain.batching.policies.plateau import Plateau
from disttrain.batching.policies.schedule import Scheduled
from disttrain.validation import Registry

__all__ = ["AdaScale", "BatchPolicy", "Fixed", "PolicyInputs", "registry"]

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
