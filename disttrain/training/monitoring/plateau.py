"""Feedback from a run to its learning rate: what ``reduce_on_plateau`` measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from disttrain.comm import Communicator
from disttrain.optim.schedules import ReduceOnPlateau, Schedule
from disttrain.optim.schedules.learning_rate import LearningRate

if TYPE_CHECKING:
    from disttrain.training.run.progress import Progress


class RateFeedback:
    """Holds the state of the learning rate, and tells it nothing: what most schedules need."""

    metric: str | None = None
    """The held-out metric that the schedule looks at, if any."""

    def __init__(self, rate: LearningRate) -> None:
        self._rate = rate

    def after_step(self, loss: torch.Tensor, num_samples: int, progress: Progress) -> None:
        """Note a step: this rank's part of its mean loss, its samples over all ranks, and the run's new progress."""

    def after_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Note the metrics of an evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values, the same on all ranks. A collective."""
        return self._rate.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rate.load_state_dict(state)


class PlateauFeedback(RateFeedback):
    """Gives ``reduce_on_plateau`` the mean training loss of each interval of epochs or steps, or a held-out metric."""

    def __init__(self, schedule: ReduceOnPlateau, rate: LearningRate, comm: Communicator) -> None:
        super().__init__(rate)
        self._schedule, self._comm = schedule, comm
        self.metric = schedule.metric if schedule.metric != "loss" else None
        self._own_sum = torch.zeros((), dtype=torch.float64, device=comm.device)  # on this rank, not yet in _sum
        self._sum, self._num_samples = 0.0, 0
        self._skipped_steps = 0  # of the whole run, as of the last step

    def after_step(self, loss: torch.Tensor, num_samples: int, progress: Progress) -> None:
        is_skipped, self._skipped_steps = progress.skipped_steps > self._skipped_steps, progress.skipped_steps
        if self.metric is not None:
            return
        if not is_skipped:  # the loss of a skipped step may be infinite
            self._own_sum += loss * num_samples
            self._num_samples += num_samples
        if self._is_due(progress) and self._num_samples:
            self._add_up_ranks()
            self._rate.observe({"loss": self._sum / self._num_samples})
            self._sum, self._num_samples = 0.0, 0

    def _is_due(self, progress: Progress) -> bool:
        if self._schedule.by == "step":
            return progress.step % self._schedule.every == 0
        return progress.offset == 0 and progress.epoch % self._schedule.every == 0

    def after_evaluation(self, metrics: Mapping[str, float]) -> None:
        if self.metric is not None:
            self._rate.observe(metrics)

    def state_dict(self) -> dict[str, Any]:
        self._add_up_ranks()
        own = {"loss_sum": self._sum, "loss_samples": self._num_samples, "skipped": self._skipped_steps}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._sum, self._num_samples = state.get("loss_sum", 0.0), state.get("loss_samples", 0)
        self._skipped_steps = state.get("skipped", 0)

    def _add_up_ranks(self) -> None:
        """Move the ranks' sums into the total, in the same order of additions whether or not the run is resumed."""
        self._sum += self._comm.all_reduce(self._own_sum).item()
        self._own_sum.zero_()


def build_feedback(schedule: Schedule, rate: LearningRate, comm: Communicator) -> RateFeedback:
    """Return what the schedule needs."""
    return PlateauFeedback(schedule, rate, comm) if isinstance(schedule, ReduceOnPlateau) else RateFeedback(rate)
