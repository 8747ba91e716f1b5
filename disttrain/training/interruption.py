"""The former place of ``disttrain.training.run.interruption``, for one release. It warns when imported."""

import warnings

from disttrain.training.run.interruption import Interruption, ignore_signals

__all__ = ["Interruption", "ignore_signals"]

warnings.warn(f"{__name__} is now disttrain.training.run.interruption", DeprecationWarning, stacklevel=2)
