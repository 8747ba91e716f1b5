"""The recorder passes what a run reports to its trackers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disttrain.training.monitoring.trackers import Tracker

logger = logging.getLogger(__name__)


class Recorder:
    """Passes records to trackers. A tracker that fails loses records, with one warning, but never ends the run.

    Args:
        trackers: in the order in which they are called; none on ranks other than 0.
    """

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = list(trackers)
        self._failed: set[Tracker] = set()

    def show_position(self, position: float) -> None:
        """Show the position of the run, in steps."""
        self._call(lambda tracker: tracker.show_position(position))

    def log_training(self, step: int, record: Mapping[str, Any]) -> None:
        """Record the numbers of a training step."""
        self._call(lambda tracker: tracker.log("train", step, record))

    def log_evaluation(self, step: int, record: Mapping[str, Any]) -> None:
        """Record the metrics of an evaluation."""
        self._call(lambda tracker: tracker.log("evaluation", step, record))

    def log_health(self, step: int, record: Mapping[str, float]) -> None:
        """Record numbers by which the health of the run is judged."""
        self._call(lambda tracker: tracker.log("health", step, record))

    def log_event(self, step: int, record: Mapping[str, Any]) -> None:
        """Record values that are not all numbers."""
        self._call(lambda tracker: tracker.log("event", step, record))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Record the summary at the end of the run."""
        self._call(lambda tracker: tracker.finish(summary))

    def close(self) -> None:
        """Close the trackers."""
        self._call(lambda tracker: tracker.close())

    def _call(self, function: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            try:
                function(tracker)
            except Exception as error:  # noqa: PERF203 - trackers are anyone's code; the run is worth more
                if tracker not in self._failed:
                    name = type(tracker).__name__
                    logger.warning("%s: records are lost, and the run continues: %s", name, error)
                self._failed.add(tracker)
