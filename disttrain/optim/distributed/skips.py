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

    in_all: int = 0
    in_a_row: int = 0

    def note(self, ending: Ending) -> None:
        """Note a step. Warns of each of the first ten that are skipped in a row, then ever more rarely."""
        if ending is Ending.TAKEN:
            self.in_a_row = 0
            return
        self.in_all += 1
        self.in_a_row += 1
        if self.in_a_row <= _FIRST or self.in_a_row.bit_count() == 1:
            more = "; more of them in a row are reported at powers of two" if self.in_a_row == _FIRST else ""
            logger.warning("step skipped: %s on some rank (%d so far)%s", _REASONS[ending], self.in_all, more)
