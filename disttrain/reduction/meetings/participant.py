"""What the sequencer asks of a reducer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from disttrain.comm.base import Communicator
from disttrain.compression.whitening import Band
from disttrain.reduction.buckets.bucket import GradientBucket, Slot
from disttrain.reduction.exchange import Executor
from disttrain.reduction.meetings.status import Status
from disttrain.reduction.step import Step, StepResult

ArrivalCallback = Callable[[GradientBucket], None]


class Participant(Protocol):
    """Gradients of one optimizer, whose exchange and step the ranks agree on when they meet.

    Attributes:
        description: its name in errors.
        overlap_step: whether it exchanges gradients at the step, not at the end of backward.
        channel: the wire of its collectives.
        executor: starts and counts its collectives.
        settings: gives the optimizer's settings as text, which must be the same on all ranks at a step.
        vote: what this rank tells the others with the next step.
        agreed_vote: the largest vote of all ranks in the last step.
        step: the state of the step.
        on_nonfinite: called when gradients of any reducer are not finite, with whether they are this one's.
    """

    description: str
    overlap_step: bool
    channel: Communicator
    executor: Executor
    settings: Callable[[], str]
    vote: int
    agreed_vote: int
    step: Step
    on_nonfinite: Callable[[bool], None]

    @property
    def num_parameters(self) -> int:
        """Number of parameters, frozen ones included."""

    @property
    def buckets(self) -> list[GradientBucket]:
        """In the order in which they are sent."""

    @property
    def slots(self) -> list[Slot]:
        """Of all buckets."""

    @property
    def has_local_gradients(self) -> bool:
        """Whether there are gradients that the other ranks have not seen, and that are not in an open exchange."""

    @property
    def has_changed_means(self) -> bool:
        """Whether the user has changed the mean since it arrived in this step."""

    @property
    def band(self) -> Band:
        """How this rank's whitened gradients compare with the second moments."""

    def detect_user_changes(self) -> None:
        """Notice unfrozen parameters, and gradients that were dropped or stepped on by other means."""

    def close_buckets(self) -> None:
        """Open an exchange if none is, and close all its buckets, so that it is known what this rank has."""

    def launch_buckets(self) -> None:
        """Close and launch all buckets that are not in flight."""

    def check_finite(self) -> bool:
        """Whether all gradients of this rank in the open exchange, whose buckets are closed, are finite."""

    def finalize(self, agreed: Status, on_arrival: ArrivalCallback | None = None) -> None:
        """Wait for the exchange; every ``parameter.grad`` is the mean over ranks then."""

    def end_step(self, result: StepResult) -> None:
        """End the step and start a new one."""

    def discard_step(self, *, number: int | None = None, is_known: bool = True) -> None:
        """End the step and remove its gradients, because some rank has dropped it.

        Args:
            number: of the step that follows; by default the next one.
            is_known: whether this rank's script knows, as it dropped the step itself or is told so now.
        """

    def clear_gradients(self) -> None:
        """Remove gradients that were stepped on."""
