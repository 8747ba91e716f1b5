"""Counting skipped steps, and saying so."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from disttrain.reduction.step import Ending

logger = logging.getLogger(__name__)
_FIRST = 10
_REASONS = {Ending.UNSOUND: "a gradient was inf or NaN", Ending.DROPPED: "gradients were dropped (zero_grad)"}


@dataclass
class Skips:
    """How many steps were skipped, in all and in a row."""

    total: int = 0
    consecutive: int = 0

    def note(self, ending: Ending) -> None:
        """Note a step. Warns of each of the first ten that are skipped in a row, then ever more rarely."""
        if ending is Ending.TAKEN:
            self.consecutive = 0
            return
        self.total += 1
        self.consecutive += 1
        if self.consecutive <= _FIRST or self.consecutive.bit_count() == 1:
            more = "; more of them in a row are reported at powers of two" if self.consecutive == _FIRST else ""
            logger.warning("step skipped: %s on some rank (%d so far)%s", _REASONS[ending], self.total, more)
