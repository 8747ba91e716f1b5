"""The weights of losses that are means over something other than equally many samples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossWeights:
    """Makes the gradients of a step one weighted mean over all ranks and all backward passes.

    Attributes:
        local: sum of the weights of this rank's losses since the last exchange; None if they have none.
        mean: mean of ``local`` over ranks, once the ranks have met for it. Gradients are divided by it.
        past: sum of the ``mean`` of the step's earlier exchanges.
    """

    local: float | None = None
    mean: float | None = None
    past: float = 0.0

    @property
    def is_pending(self) -> bool:
        """Whether losses have weights whose mean is not known yet, so that no gradient can be sent."""
        return self.local is not None and self.mean is None

    def add(self, weight: float) -> None:
        """Add the weight of a loss of the next exchange."""
        self.local = (self.local or 0.0) + weight

    def clear(self) -> None:
        """Forget the weights since the last exchange."""
        self.local = self.mean = None

    def combine(self) -> tuple[float, float]:
        """Return the factors of the mean that arrives and of the mean of the step's earlier exchanges.

        With weights they add up to one weighted mean; without, the means add up as they are.
        """
        if self.mean is None or self.past + self.mean == 0:
            return 1.0, 1.0
        past, self.past = self.past, self.past + self.mean
        return self.mean / self.past, past / self.past
