"""One step of an optimizer, from its first gradient until it is taken or dropped.

Phases of a step on one rank; ``buckets/bucket.py`` has the stages of the buckets within them::

             a gradient comes outside no_sync,
             or another rank has one                      the ranks have met, all buckets have arrived
    EMPTY -----------------------------------> OPEN ---------------------------------> AVERAGED
      ^                                         |  ^                                      |  |
      |                                         |  +-- a further backward pass -----------+  |
      |  DROPPED during the exchange            |                                            |
      +-----------------------------------------+                                            |
      |                                                                                      |
      +--------------------------------------------------------------------------------------+
         TAKEN       the optimizer has stepped: the compressors' state counts
         NON_FINITE  an inf or NaN on some rank: state and buffers are reverted, no rank steps
         DROPPED     gradients were removed or zeroed: state is reverted; ranks at the step skip it

EMPTY -> OPEN opens all buckets, OPEN -> AVERAGED finalizes and exposes them, and the end of the step releases them and
starts a new ``Step``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch

from disttrain.reduction.exchange import Exchange
from disttrain.reduction.loss_weights import LossWeights
from disttrain.reduction.measurements.meter import Meter


class Phase(Enum):
    EMPTY = "empty"
    """No gradient has come since the last step ended, or only local ones (``no_sync``)."""
    OPEN = "open"
    """An exchange is open: gradients are gathered and sent."""
    AVERAGED = "averaged"
    """``parameter.grad`` is the mean over ranks, and the user's to change."""


class StepResult(Enum):
    """How a step ended, or what ``optimizer.step`` is to do."""

    TAKEN = "taken"
    NON_FINITE = "non-finite"
    """A gradient was inf or NaN on some rank: all ranks skip the step."""
    DROPPED = "dropped"
    """Some rank has dropped its gradients, so all ranks drop theirs."""


@dataclass
class Step:
    """The state of one step.

    Attributes:
        number: number of steps that ended before it.
        phase: see the module.
        num_exchanges: number of finished exchanges.
        is_finite: whether all finished exchanges were finite.
        exchanges: the open exchange's programs by bucket, as far as they are launched.
        finite_flags: of the open exchange, one 0-d tensor for each closed bucket.
        meters: the meters that measure the open exchange.
        weights: the weights of the losses.
        scale: what the losses of the open exchange were multiplied by.
        is_changed: whether the user changed the mean before a further exchange added to it.
        version: version of the parameters when the mean last arrived (``user_changes.version``).
        has_stepped: whether the optimizer has stepped on each bucket as it arrived.
        refresh_next: whether the ranks have agreed that the next step is to be a refresh (``compression.whitening``).
        follows_drop: whether another rank dropped the step before, and this rank has yet to skip it.
    """

    number: int = 0
    phase: Phase = Phase.EMPTY
    num_exchanges: int = 0
    is_finite: bool = True
    exchanges: list[Exchange] = field(default_factory=list)
    finite_flags: list[torch.Tensor] = field(default_factory=list)
    meters: list[Meter] = field(default_factory=list)
    weights: LossWeights = field(default_factory=LossWeights)
    scale: float = 1.0
    is_changed: bool = False
    version: int = 0
    has_stepped: bool = False
    refresh_next: bool = False
    follows_drop: bool = False

    @property
    def is_under_way(self) -> bool:
        """Whether there are gradients between backward and step."""
        return self.phase is not Phase.EMPTY

    def open(self, scale: float, meters: list[Meter]) -> None:
        """Start an exchange."""
        assert self.phase is not Phase.OPEN
        self.phase, self.exchanges, self.finite_flags = Phase.OPEN, [], []
        self.scale, self.meters, self.follows_drop = scale, meters, False

    def finalize(self, *, is_finite: bool, version: int) -> None:
        """Finish the exchange."""
        assert self.phase is Phase.OPEN
        self.phase, self.exchanges, self.meters = Phase.AVERAGED, [], []
        self.is_finite &= is_finite
        self.num_exchanges += 1
        self.weights.clear()
        self.version = version
