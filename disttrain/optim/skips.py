"""Counting skipped steps, and saying so."""

from __future__ import annotations

import logging
from dataclasses import dataclass

logger = logging.getLogger(__name__)
_FIRST = 10


@dataclass
class Skips:
    """How many steps were skipped, in all and in a row."""

    in_all: int = 0
    in_a_row: int = 0

    def note(self, reason: str) -> None:
        """One more. Warns of each of the first ten in a row, then ever more rarely."""
        self.in_all += 1
        self.in_a_row += 1
        if self.in_a_row <= _FIRST or self.in_a_row.bit_count() == 1:
            more = "; more of them in a row are reported at powers of two" if self.in_a_row == _FIRST else ""
            logger.warning("step skipped: %s on some rank (%d so far)%s", reason, self.in_all, more)
