"""Gradient compressors: their interface, the algorithms, and the policy that assigns them to parameters.

Every module in ``algorithms`` is imported, which registers its compressors.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from disttrain.compression import algorithms
from disttrain.compression.algorithms.blockwise import Blockwise4, Blockwise8
from disttrain.compression.algorithms.cast import BFloat16, Float16
from disttrain.compression.algorithms.dense import Dense
from disttrain.compression.algorithms.dgc import DGC
from disttrain.compression.algorithms.efsign import EFSign
from disttrain.compression.algorithms.natural import Natural
from disttrain.compression.algorithms.onebit import OneBit
from disttrain.compression.algorithms.powersgd import PowerSGD
from disttrain.compression.algorithms.qsgd import QSGD
from disttrain.compression.algorithms.randomk import RandomK
from disttrain.compression.algorithms.signsgd import SignSGD
from disttrain.compression.algorithms.terngrad import TernGrad
from disttrain.compression.algorithms.threshold import Threshold
from disttrain.compression.algorithms.topk import TopK
from disttrain.compression.base import Bucket, Compressor, NewState, Program, State, registry
from disttrain.compression.codec import Codec, FusedCodec, Payload
from disttrain.compression.policy import Policy, Rule

for _module in pkgutil.iter_modules(algorithms.__path__):
    importlib.import_module(f"{algorithms.__name__}.{_module.name}")

__all__ = [
    "DGC",
    "QSGD",
    "BFloat16",
    "Blockwise4",
    "Blockwise8",
    "Bucket",
    "Codec",
    "Compressor",
    "Dense",
    "EFSign",
    "Float16",
    "FusedCodec",
    "Natural",
    "NewState",
    "OneBit",
    "Payload",
    "Policy",
    "PowerSGD",
    "Program",
    "RandomK",
    "Rule",
    "SignSGD",
    "State",
    "TernGrad",
    "Threshold",
    "TopK",
    "build",
    "names",
    "registry",
]


def names() -> list[str]:
    """Return the names of all registered compressors."""
    return registry.names()


def build(spec: Compressor | str | Mapping[str, Any]) -> Compressor:
    """Return a compressor from an instance, a name, or a mapping as in a config (``{"name": "topk", "ratio": 0.01}``).

    Raises:
        UserError: an unknown name or option, or a value out of bounds.
    """
    return registry.build(spec)
