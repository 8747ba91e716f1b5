"""Distributed data-parallel training for PyTorch with pluggable gradient compression.

The names in ``__all__`` are the public interface. They are imported on first use, so ``import disttrain`` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from disttrain.errors import PeerLostError, UserError

if TYPE_CHECKING:
    from disttrain import compression
    from disttrain.batching import GradientNoise, GrowingBatch
    from disttrain.comm import init
    from disttrain.optim.averaging import WeightAverage
    from disttrain.optim.distributed import DistributedOptimizer
    from disttrain.optim.distributed.loss_scale import LossScale
    from disttrain.optim.layers.groups import Layers
    from disttrain.optim.optimizers.lamb import LAMB
    from disttrain.optim.optimizers.lars import LARS
    from disttrain.optim.optimizers.regularization import Regularization
    from disttrain.optim.schedules.learning_rate import LearningRate
    from disttrain.training.run.interruption import Interruption
    from disttrain.training.start_from import load_weights

__version__ = "0.1.0"

__all__ = [
    "LAMB",
    "LARS",
    "DistributedOptimizer",
    "GradientNoise",
    "GrowingBatch",
    "Interruption",
    "Layers",
    "LearningRate",
    "LossScale",
    "PeerLostError",
    "Regularization",
    "UserError",
    "WeightAverage",
    "__version__",
    "compression",
    "init",
    "load_weights",
]

# Imported on first access, so that `disttrain --help` does not wait for torch.
_LAZY_IMPORTS = {
    "DistributedOptimizer": "disttrain.optim.distributed",
    "GradientNoise": "disttrain.batching",
    "GrowingBatch": "disttrain.batching",
    "Interruption": "disttrain.training.run.interruption",
    "LAMB": "disttrain.optim.optimizers.lamb",
    "LARS": "disttrain.optim.optimizers.lars",
    "Layers": "disttrain.optim.layers.groups",
    "LearningRate": "disttrain.optim.schedules.learning_rate",
    "LossScale": "disttrain.optim.distributed.loss_scale",
    "Regularization": "disttrain.optim.optimizers.regularization",
    "WeightAverage": "disttrain.optim.averaging",
    "init": "disttrain.comm",
    "load_weights": "disttrain.training.start_from",
}


def __getattr__(name: str) -> Any:
    if name == "compression":
        return importlib.import_module("disttrain.compression")
    if name in _LAZY_IMPORTS:
        return getattr(importlib.import_module(_LAZY_IMPORTS[name]), name)
    raise AttributeError(f"module 'disttrain' has no attribute {name!r}")
