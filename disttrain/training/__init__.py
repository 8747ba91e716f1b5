"""Training runs: the trainer and its config, data, checkpoints and metrics.

A run is described by a ``Config`` and carried out by a ``Trainer`` on each rank.
"""

from __future__ import annotations

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    """The former place of ``disttrain.training.run.interruption``, without an import of it; for one release."""
    if name != "interruption":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from disttrain.training.run import interruption

    warnings.warn(
        "disttrain.training.interruption is now disttrain.training.run.interruption", DeprecationWarning, stacklevel=2
    )
    return interruption
