"""Gradient compressors, one file an algorithm. Every compressor in this folder is found and registered by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from disttrain.compression.base import Bucket, Compressor, NewState, Program, State, registry
from disttrain.compression.blockwise import Blockwise4, Blockwise8
from disttrain.compression.cast import BFloat16, Float16
from disttrain.compression.codec import Codec, FusedCodec, Payload
from disttrain.compression.dense import Dense
from disttrain.compression.dgc import DGC
from disttrain.compression.efsign import EFSign
from disttrain.compression.natural import Natural
from disttrain.compression.onebit import OneBit
from disttrain.compression.policy import Policy, Rule
from disttrain.compression.powersgd import PowerSGD
from disttrain.compression.qsgd import QSGD
from disttrain.compression.randomk import RandomK
from disttrain.compression.signsgd import SignSGD
from disttrain.compression.terngrad import TernGrad
from disttrain.compression.threshold import Threshold
from disttrain.compression.topk import TopK

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

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
    """The names of all registered compressors."""
    return registry.names()


def build(spec: Compressor | str | Mapping[str, Any]) -> Compressor:
    """A compressor from an instance, a name, or a mapping as in a config (``{"name": "topk", "ratio": 0.01}``).

    Raises:
        UserError: an unknown name or option, or a value out of bounds.
    """
    return registry.build(spec)
