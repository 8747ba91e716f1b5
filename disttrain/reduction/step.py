"""What a step of an optimizer is while it lasts: from its first gradient until it is taken or dropped."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch

from disttrain.reduction.exchange import Exchange
from disttrain.reduction.measurements.meter import Meter


class Phase(Enum):
    EMPTY = "empty"
    """No gradient has come since the last step ended, or what has come is this rank's own (``no_sync``)."""
    OPEN = "open"
    """An exchange is under way: gradients come in, buckets leave."""
    LANDED = "landed"
    """``parameter.grad`` is the mean over ranks, and the user's to change."""


class Ending(Enum):
    """How a step ended, or what ``step`` is to do."""

    TAKEN = "taken"
    UNSOUND = "unsound"
    """A gradient was inf or NaN on some rank: all skip it."""
    DROPPED = "dropped"
    """Some rank has dropped its gradients, so all do."""


@dataclass
class Step:
    """EMPTY -> OPEN -> LANDED (-> OPEN -> LANDED, with each further backward pass), then a new one begins.

    Attributes:
        number: of steps that ended before it.
        num_exchanges: that have landed.
        is_sound: all that has landed was finite.
        exchanges: of the exchange under way, by bucket, as far as they have started.
        finite: one flag for each bucket that is closed.
        measuring: what looks at the exchange under way.
        weight: of this rank's losses since the last exchange; None if they have none.
        unit: the mean over ranks of ``weight``, which the gradients are divided by, once it is known.
        past_unit: the sum of the units of this step's exchanges that have landed.
        scale: what the losses of the exchange under way were multiplied by.
        is_changed: the user has changed means before a further exchange added to them.
        version: of the parameters when means last landed (``changes.version``).
    """

    number: int = 0
    phase: Phase = Phase.EMPTY
    num_exchanges: int = 0
    is_sound: bool = True
    exchanges: list[Exchange] = field(default_factory=list)
    finite: list[torch.Tensor] = field(default_factory=list)
    measuring: list[Meter] = field(default_factory=list)
    weight: float | None = None
    unit: float | None = None
    past_unit: float = 0.0
    scale: float = 1.0
    is_changed: bool = False
    version: int = 0

    @property
    def is_under_way(self) -> bool:
        """Whether there are gradients between backward and step."""
        return self.phase is not Phase.EMPTY

    def shares(self) -> tuple[float, float]:
        """What the means that arrive and those of the step's earlier exchanges are to be multiplied by.

        Where losses have weights they make up one weighted mean; elsewhere they add up.
        """
        if self.unit is None or self.past_unit + self.unit == 0:
            return 1.0, 1.0
        past, self.past_unit = self.past_unit, self.past_unit + self.unit
        return self.unit / self.past_unit, past / self.past_unit
