"""Error feedback, and the units in which gradients are encoded, as kernels see them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Units(NamedTuple):
    """What gradients are divided by before they are encoded (``compression.whitening``).

    Attributes:
        scale: of the gradient's shape.
        bound: the quotients are clamped to this magnitude.
    """

    scale: torch.Tensor
    bound: float

    def convert(self, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient in these units."""
        return (grad / self.scale).clamp_(-self.bound, self.bound)


class Feedback(NamedTuple):
    """Which residual a kernel adds to the gradient, and where it writes the new one.

    Attributes:
        residual: added to the gradient. None if the gradient already includes it.
        new_residual: set to ``grad + residual`` minus what the payload decodes to. It may be the gradient, but must not
            overlap ``residual``. Without ``residual`` it is the gradient, which is updated in place.
        units: of the residuals, if they are not those of the gradient. The gradient is converted before it is used.
            Only for kernels that say so.
    """

    residual: torch.Tensor | None
    new_residual: torch.Tensor
    units: Units | None = None

    @classmethod
    def in_place(cls, total: torch.Tensor) -> Feedback:
        """Feedback for ``total``, the gradient plus the residual, which becomes the new residual."""
        return cls(None, total)

    def chunk(self, start: int, end: int) -> Feedback:
        """The same for the elements from ``start`` to ``end``, as views."""
        residual = None if self.residual is None else self.residual[start:end]
        units = None if self.units is None else self.units._replace(scale=self.units.scale[start:end])
        return Feedback(residual, self.new_residual[start:end], units)
