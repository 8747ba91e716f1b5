"""Meetings of the ranks of a communicator: at the end of a backward pass, at a step, and at the other meeting points.

Programs of ranks may differ: a branch that only some take, one batch more or less, the turn of another optimizer. So at
every meeting point a rank tells the others where it is and what it has (``status.py``). What any rank has to send, all
ranks exchange, with zeros where they have nothing. Then each rank continues as far as it may: a step is taken when all
ranks have come to it. One sequencer serves all optimizers of a communicator.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from disttrain.collectives import AllReduce
from disttrain.comm.base import Communicator
from disttrain.compression.whitening import Band
from disttrain.reduction.meetings import contradictions
from disttrain.reduction.meetings.backward_passes import BackwardPasses
from disttrain.reduction.meetings.participant import ArrivalCallback, Participant
from disttrain.reduction.meetings.reports import report
from disttrain.reduction.meetings.status import MeetingPoint, Status, WeightRequest, from_tensor, to_tensor
from disttrain.reduction.step import Phase, StepResult

_sequencers: weakref.WeakKeyDictionary[Communicator, Sequencer] = weakref.WeakKeyDictionary()

# A rank at its step waits for all others, a rank in ``synchronize`` for those that are at neither. Others do not wait.
_MOVES = {
    MeetingPoint.BACKWARD_END: 2,
    MeetingPoint.DROP: 2,
    MeetingPoint.WEIGHT: 2,
    MeetingPoint.SYNCHRONIZE: 1,
}


@dataclass
class _Entry:
    """A reducer, which may no longer exist on this rank, and what is known of it then."""

    reference: weakref.ref[Participant]
    description: str
    num_parameters: int


class _Row(NamedTuple):
    """A reducer in a meeting, what all ranks have said about it, and what this rank has said."""

    participant: Participant
    agreed: Status
    own: Status


class Sequencer:
    """Brings the ranks of one communicator together. Use ``Sequencer.of(comm)``.

    Attributes:
        lock: held while hooks of backward passes run, as passes may run in several threads.
        last_active: the highest rank that had not joined at the last meeting.
    """

    def __init__(self, comm: Communicator) -> None:
        self.lock = threading.RLock()
        self.last_active = 0
        self._control = comm.channel(is_small=True)
        self._registered: list[_Entry] = []
        self._num_registered = 0
        self._passes = BackwardPasses()

    @staticmethod
    def of(comm: Communicator) -> Sequencer:
        """Return the communicator's sequencer. The first call makes it, on all ranks together."""
        if comm not in _sequencers:
            _sequencers[comm] = Sequencer(comm)
        return _sequencers[comm]

    def register(self, participant: Participant) -> None:
        """Add a reducer, on all ranks at the same point of their programs. A collective.

        Reducers that no longer exist on any rank are removed.
        """
        alive = self._control.all_gather_object([entry.reference() is not None for entry in self._registered])
        kept = [index for index, of_ranks in enumerate(zip(*alive, strict=True)) if any(of_ranks)]
        self._registered = [self._registered[index] for index in kept]
        self._num_registered += 1
        participant.description = f"optimizer {self._num_registered} ({participant.description})"
        self._registered.append(_Entry(weakref.ref(participant), participant.description, participant.num_parameters))

    def resize(self, participant: Participant) -> None:
        """Note that a reducer has more parameters now, on all ranks."""
        entry = next(entry for entry in self._registered if entry.reference() is participant)
        entry.num_parameters = participant.num_parameters

    def _participants(self) -> Iterator[Participant]:
        yield from (one for one in [entry.reference() for entry in self._registered] if one is not None)

    def tell_nonfinite(self, participant: Participant) -> None:
        """Tell all reducers that gradients of one of them are not finite."""
        for one in self._participants():
            one.on_nonfinite(one is participant)

    def may_leave_early(self, channel: Communicator) -> bool:
        """Whether buckets may be sent before the ranks have met, in an order that other ranks may not share yet."""
        return not self._control.shares_order and (not channel.shares_order or len(self._registered) == 1)

    def join(self) -> int:
        """Take part in the others' steps until all ranks call this. Return the last active rank. A collective."""
        for participant in self._participants():
            participant.clear_gradients()
        self.meet(MeetingPoint.JOIN)
        return self.last_active

    def note_backward(self) -> None:
        """Called by hooks: meet when the backward pass that runs them has ended."""
        self._passes.note(self._end_pass)

    def _end_pass(self) -> None:
        with self.lock:
            if self._passes.finish(self._end_pass):
                self.meet(MeetingPoint.BACKWARD_END)

    def meet(
        self,
        point: MeetingPoint,
        participant: Participant | None = None,
        on_arrival: ArrivalCallback | None = None,
    ) -> StepResult:
        """Meet the other ranks until this rank may continue. A collective.

        Args:
            point: where this rank is.
            participant: the reducer whose meeting point it is; None: all reducers.
            on_arrival: see ``Reducer.finalize``. Used at a step, if all ranks are at it and only its gradients are
                exchanged.

        Returns:
            At a step, what to do with it. Elsewhere ``TAKEN``.

        Raises:
            UserError: the ranks' programs contradict each other; on all ranks.
        """
        with self.lock, torch.no_grad():
            while True:
                result = self._meet_once(point, participant, on_arrival)
                if result is not None:
                    return result

    def _meet_once(
        self, point: MeetingPoint, participant: Participant | None, on_arrival: ArrivalCallback | None
    ) -> StepResult | None:
        """Meet once. Return None if this rank has to wait for another meeting."""
        registered = [entry.reference() for entry in self._registered]
        sizes = [entry.num_parameters for entry in self._registered]
        own = [self._report(one, size, point, participant) for one, size in zip(registered, sizes, strict=True)]
        moves = _MOVES.get(point, 0)
        last_active = 0 if point is MeetingPoint.JOIN else self._control.rank + 1
        message = to_tensor(moves, last_active, own)
        executor = next(one for one in (participant, *registered) if one is not None).executor
        combined = executor.start(AllReduce(message, "max"), comm=self._control).wait()
        assert isinstance(combined, torch.Tensor)
        any_moves, any_active, agreed = from_tensor(combined, sizes)
        rows = [_Row(one, *both) for one, *both in zip(registered, agreed, own, strict=True) if one is not None]
        if any_active:
            self.last_active = any_active - 1

        for entry, status in zip(self._registered, agreed, strict=True):
            contradictions.check_existence(entry.description, status)
        for one, status, _ in rows:
            contradictions.check(one, status, point, self._control)
        if any(status.has_dropped for _, status, _ in rows):
            return self._follow_drops(rows, point, participant)
        self._average_weights(rows)
        # While some rank only asks for the mean weight, before its backward pass, the others keep their gradients.
        sending = [row for row in rows if row.agreed.sends and row.agreed.weight_request != WeightRequest.AHEAD]
        for one, _, _ in sending:
            one.launch_buckets()
        at_step = next((one for one, status, _ in rows if status.is_step), None)
        is_arriving = at_step is not None and at_step is participant and all(one is at_step for one, _, _ in sending)
        for one, status, _ in sending:
            one.finalize(status, on_arrival if is_arriving else None)
        if any_active and not (any_moves or any(status.sends or status.is_step for status in agreed)):
            contradictions.raise_different_steps(participant, self._control)
        if is_arriving and participant is not None and not participant.overlap_step and sending:
            return None  # gradients that have just arrived are compared at the next meeting
        if point is MeetingPoint.SYNCHRONIZE and any_moves == _MOVES[MeetingPoint.BACKWARD_END]:
            return None  # ranks in a backward pass come here, or to the step, with its gradients
        return self._continue(rows, point, participant, is_over=not any_active)

    def _report(
        self, one: Participant | None, size: int, point: MeetingPoint, participant: Participant | None
    ) -> Status:
        """Return this rank's status of a reducer, at a meeting point of ``participant``. Close its buckets if it sends.

        They are launched too, before the ranks have met, where the engine allows it.
        """
        if one is None:
            return Status(is_gone=True, uses=[0] * size)
        one.detect_user_changes()
        is_here = participant is None or participant is one
        if point is MeetingPoint.WEIGHT or (one.overlap_step and (point is MeetingPoint.BACKWARD_END or not is_here)):
            sends = False
        else:
            waits = is_here and point in (MeetingPoint.SYNCHRONIZE, MeetingPoint.STEP, MeetingPoint.JOIN)
            sends = one.step.phase is Phase.OPEN or (waits and one.has_local_gradients)
        if sends:
            one.close_buckets()
            if self.may_leave_early(one.channel) and not one.step.weights.is_pending:
                one.launch_buckets()
        return report(one, point, is_here=is_here and participant is not None, sends=sends)

    def _follow_drops(
        self, rows: Sequence[_Row], point: MeetingPoint, participant: Participant | None
    ) -> StepResult | None:
        """Drop the steps that other ranks have dropped.

        If all ranks are at a dropped step, all skip it, unless some rank has new gradients to send.
        """
        result = None
        for one, agreed, own in rows:
            if own.step_number < agreed.step_number:
                is_own = one is participant and point in (MeetingPoint.STEP, MeetingPoint.DROP)
                one.discard_step(number=agreed.step_number, is_known=is_own or point is MeetingPoint.JOIN)
                if one is participant and point is MeetingPoint.STEP and not agreed.is_step:
                    result = StepResult.DROPPED
            if agreed.has_dropped and agreed.is_step and one is participant and not agreed.sends:
                result = StepResult.DROPPED
        return result

    def _average_weights(self, rows: Sequence[_Row]) -> None:
        """Average the weights of losses over ranks, where some rank needs the mean."""
        for one, agreed, _ in rows:
            if agreed.weight_request:
                weights = one.step.weights
                weights.local = weights.local or 0.0
                own = torch.tensor([weights.local], dtype=torch.float64)
                weights.mean = float(one.executor.start(AllReduce(own, "mean"), comm=self._control).wait())  # type: ignore[arg-type]

    def _continue(
        self, rows: Sequence[_Row], point: MeetingPoint, participant: Participant | None, *, is_over: bool
    ) -> StepResult | None:
        for one, agreed, _ in rows:
            is_own = one is participant
            if agreed.drops:
                one.discard_step(is_known=point is MeetingPoint.JOIN or (is_own and point is MeetingPoint.STEP))
                if point is MeetingPoint.STEP and is_own:
                    return StepResult.DROPPED
            if agreed.is_step and (is_own or point is MeetingPoint.JOIN):
                one.agreed_vote, one.step.refresh_next = agreed.vote, Band(agreed.band).asks_for_refresh
                result = StepResult.TAKEN if one.step.is_finite else StepResult.NON_FINITE
                if point is not MeetingPoint.JOIN:
                    return result
                one.end_step(result)  # a rank that has joined gets the others' weights in the end
                one.clear_gradients()
        if point is MeetingPoint.JOIN:
            return StepResult.TAKEN if is_over else None
        return None if point is MeetingPoint.STEP else StepResult.TAKEN
