"""The distributed optimizer. ``optimizer.py`` is the main path; the other files hold one concern each."""

from __future__ import annotations

from disttrain.optim.distributed.optimizer import DistributedOptimizer

__all__ = ["DistributedOptimizer"]
