"""What ``reduce_on_plateau`` looks at in a run: the training loss of a stretch, or what an evaluation gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from disttrain.comm import Communicator
from disttrain.errors import UserError
from disttrain.optim.schedules import ReduceOnPlateau, Schedule
from disttrain.optim.schedules.learning_rate import LearningRate
from disttrain.validation import hint

if TYPE_CHECKING:
    from disttrain.training.run.progress import Progress


class PlateauWatch:
    """Feeds the learning rate's tracker with numbers that are equal on all ranks. ``NoPlateau`` is its twin."""

    def __init__(self, section: ReduceOnPlateau, rate: LearningRate, comm: Communicator) -> None:
        self._section, self._rate, self._comm = section, rate, comm
        self._own = torch.zeros((), dtype=torch.float64, device=comm.device)  # this rank's, since the last fold
        self._sum, self._num_samples, self._skipped = 0.0, 0, 0

    @property
    def needs_evaluation(self) -> bool:
        return self._section.metric != "loss"

    def check(self, metrics: Mapping[str, Any]) -> None:
        """Raise UserError if evaluation does not give the metric."""
        if self._section.metric not in metrics:
            choices = hint(self._section.metric, ["loss", *metrics])
            raise UserError(f"schedule.metric={self._section.metric!r} is no metric of the task{choices}")

    def step(self, loss: torch.Tensor, num_samples: int, progress: Progress) -> None:
        """A step is done: this rank's part of its mean loss, and how far the run has come with it."""
        section = self._section
        was_skipped, self._skipped = progress.skipped_steps > self._skipped, progress.skipped_steps
        if section.metric != "loss":
            return
        if not was_skipped:  # its loss may be infinite
            self._own += loss * num_samples
            self._num_samples += num_samples
        by_step, by_epoch = progress.step % section.every == 0, progress.epoch % section.every == 0
        is_due = by_step if section.by == "step" else progress.offset == 0 and by_epoch
        if is_due and self._num_samples:
            self._fold()
            self._rate.observe({"loss": self._sum / self._num_samples})
            self._sum, self._num_samples = 0.0, 0

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Take note of an evaluation."""
        if self._section.metric != "loss":
            self._rate.observe(metrics)

    def state_dict(self) -> dict[str, Any]:
        """JSON, equal on all ranks, all of which must call this."""
        self._fold()  # so that a run that stops here and one that does not add up alike
        return {"loss_sum": self._sum, "loss_samples": self._num_samples, "skipped": self._skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sum, self._num_samples = state.get("loss_sum", 0.0), state.get("loss_samples", 0)
        self._skipped = state.get("skipped", 0)

    def _fold(self) -> None:
        self._sum += self._comm.all_reduce(self._own).item()
        self._own.zero_()


class NoPlateau:
    """The twin for all other schedules."""

    needs_evaluation = False

    def check(self, metrics: Mapping[str, Any]) -> None: ...
    def step(self, loss: torch.Tensor, num_samples: int, progress: Progress) -> None: ...
    def evaluation(self, metrics: Mapping[str, float]) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def watch(schedule: Schedule, rate: LearningRate, comm: Communicator) -> PlateauWatch | NoPlateau:
    """The one that the schedule needs."""
    return PlateauWatch(schedule, rate, comm) if isinstance(schedule, ReduceOnPlateau) else NoPlateau()
