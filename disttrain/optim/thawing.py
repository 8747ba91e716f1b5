"""The former place of ``disttrain.optim.layers.unfreezing``, for one release. It warns when imported."""

import warnings

from disttrain.optim.layers.unfreezing import Unfreezing as Thawing

__all__ = ["Thawing"]

warnings.warn(
    f"{__name__}.Thawing is now disttrain.optim.layers.unfreezing.Unfreezing", DeprecationWarning, stacklevel=2
)
