"""Counting and reporting skipped steps."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from disttrain.reduction.step import StepResult

logger = logging.getLogger(__name__)
_NUM_REPORTED = 10
_REASONS = {
    StepResult.NON_FINITE: "a gradient was inf or NaN",
    StepResult.DROPPED: "gradients were dropped (zero_grad)",
}


@dataclass
class SkipCounter:
    """Counts skipped steps.

    Attributes:
        total: number of skipped steps.
        consecutive: number of steps skipped since the last one that was taken.
    """

    total: int = 0
    consecutive: int = 0

    def count(self, result: StepResult) -> None:
        """Count a step. Log a warning for each of the first ten consecutive skips, then at powers of two."""
        if result is StepResult.TAKEN:
            self.consecutive = 0
            return
        self.total += 1
        self.consecutive += 1
        if self.consecutive <= _NUM_REPORTED or self.consecutive.bit_count() == 1:
            more = "; more of them in a row are reported at powers of two" if self.consecutive == _NUM_REPORTED else ""
            logger.warning("step skipped: %s on some rank (%d so far)%s", _REASONS[result], self.total, more)
