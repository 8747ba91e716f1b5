"""Error feedback, as kernels see it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Feedback(NamedTuple):
    """Which residual a kernel adds to the gradient, and where it writes the new one.

    Attributes:
        residual: added to the gradient. None if the gradient already includes it.
        new_residual: set to ``grad + residual`` minus what the payload decodes to. It may be the gradient, but must not
            overlap ``residual``. Without ``residual`` it is the gradient, which is updated in place.
    """

    residual: torch.Tensor | None
    new_residual: torch.Tensor

    @classmethod
    def in_place(cls, total: torch.Tensor) -> Feedback:
        """Feedback for ``total``, the gradient plus the residual, which becomes the new residual."""
        return cls(None, total)

    def chunk(self, start: int, end: int) -> Feedback:
        """The same for the elements from ``start`` to ``end``, as views."""
        residual = None if self.residual is None else self.residual[start:end]
        return Feedback(residual, self.new_residual[start:end])
