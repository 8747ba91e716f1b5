"""Where the ranks of a communicator meet: at a backward pass's end, at a step, and where else gradients concern others.

Programs of ranks may differ: a branch that only some take, a batch more or less, another optimizer's turn. So at every
such place a rank tells the others where it is and what it has (``status.py``). What any rank has to send, all
exchange, those without it with zeros; then each goes on as far as it may: a step is taken where all ranks have come to
it. One sequencer serves all optimizers of a communicator.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from enum import Enum
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from disttrain.collectives import AllReduce
from disttrain.comm.base import Communicator
from disttrain.errors import UserError
from disttrain.reduction.meetings import changes
from disttrain.reduction.meetings.status import Status, Weighing, from_tensor, to_tensor
from disttrain.reduction.step import Ending, Phase

if TYPE_CHECKING:
    from disttrain.reduction.bucket import GradientBucket
    from disttrain.reduction.reducer import Reducer

_sequencers: weakref.WeakKeyDictionary[Communicator, Sequencer] = weakref.WeakKeyDictionary()
_BACKWARD_OF_A_FUNCTION = torch.autograd.function.BackwardCFunction.apply.__code__
_CLOSE = 1e-5


class MeetingPoint(Enum):
    """Where a rank is when it meets the others."""

    PASS = "the end of a backward pass"
    SYNCHRONIZE = "synchronize()"
    STEP = "step()"
    DROP = "zero_grad()"
    WEIGH = "scale(loss, weight=...)"
    JOIN = "join()"


# A rank at its step waits for the others; of those elsewhere, ranks that synchronize wait for those that do not.
_MOVES = {MeetingPoint.PASS: 2, MeetingPoint.DROP: 2, MeetingPoint.WEIGH: 2, MeetingPoint.SYNCHRONIZE: 1}


class Sequencer:
    """Brings the ranks of one communicator together. ``Sequencer.of(comm)`` is the one that there is.

    Attributes:
        lock: held while hooks of backward passes run, as passes may run in several threads.
        last_active: the highest rank that had not joined when the ranks last met.
    """

    def __init__(self, comm: Communicator) -> None:
        self.lock = threading.RLock()
        self.last_active = 0
        self._control = comm.channel(is_small=True)
        self._reducers: list[weakref.ref[Reducer]] = []
        self._num_registered = 0
        self._sizes: list[int] = []  # numbers of parameters, also of reducers that are gone
        self._passes: weakref.WeakValueDictionary[int, _PassEnd] = weakref.WeakValueDictionary()

    @staticmethod
    def of(comm: Communicator) -> Sequencer:
        """The communicator's, made when it is first asked for, by all ranks together."""
        if comm not in _sequencers:
            _sequencers[comm] = Sequencer(comm)
        return _sequencers[comm]

    def register(self, reducer: Reducer) -> None:
        """Add a reducer; all ranks add theirs at the same point of their programs. Those that are gone make room."""
        alive = self._control.all_gather_object([entry() is not None for entry in self._reducers])
        kept = [index for index, of_ranks in enumerate(zip(*alive, strict=True)) if any(of_ranks)]
        self._reducers = [self._reducers[index] for index in kept]
        self._sizes = [self._sizes[index] for index in kept]
        self._num_registered += 1
        reducer.description = f"optimizer {self._num_registered} ({reducer.description})"
        self._reducers.append(weakref.ref(reducer))
        self._sizes.append(reducer.members.num_parameters)

    def resize(self, reducer: Reducer) -> None:
        """Note that a reducer has got more parameters, on all ranks."""
        self._sizes[[entry() for entry in self._reducers].index(reducer)] = reducer.members.num_parameters

    def tell_unsound(self, reducer: Reducer) -> None:
        """Tell all reducers that gradients of one of them are unsound."""
        for one in [entry() for entry in self._reducers]:
            if one is not None:
                one.on_unsound(one is reducer)

    def may_leave_early(self, channel: Communicator) -> bool:
        """Whether buckets may leave before the ranks have met, so in an order that other ranks may not share yet."""
        return not self._control.shares_order and (not channel.shares_order or len(self._reducers) == 1)

    def join(self) -> int:
        """Take part in the others' steps until all ranks call this; the rank that was active last. A collective."""
        for reducer in [entry() for entry in self._reducers]:
            if reducer is not None:
                reducer.clear()
        self.meet(MeetingPoint.JOIN)
        return self.last_active

    # Backward passes

    def note_backward(self) -> None:
        """Called by hooks: have the ranks meet when the backward pass that runs them has ended."""
        task = torch._C._current_graph_task_id()
        if task not in self._passes:
            end = _PassEnd(self)
            self._passes[task] = end
            torch.autograd.Variable._execution_engine.queue_callback(end)

    def _end_pass(self, end: _PassEnd) -> None:
        with self.lock:
            self._passes.pop(torch._C._current_graph_task_id(), None)
            outer = _enclosing_backward()
            if outer is not None:  # of checkpointed activations: what encloses it goes on, and may have no hook to come
                outer.register_hook(lambda *_: self.note_backward())
            elif not self._passes:
                self.meet(MeetingPoint.PASS)

    # Meetings

    def meet(
        self,
        place: MeetingPoint,
        reducer: Reducer | None = None,
        on_arrival: Callable[[GradientBucket], None] | None = None,
    ) -> Ending:
        """Come together with the other ranks, as often as is needed for this one to go on. A collective.

        Args:
            place: where this rank is.
            reducer: whose place it is; None: of all.
            on_arrival: see ``Reducer.land``; for a step, if all ranks have come to it and nothing else is exchanged.

        Returns:
            At a step, what to do with it. Elsewhere ``TAKEN``.

        Raises:
            UserError: the ranks' programs contradict each other; on all ranks.
        """
        with self.lock, torch.no_grad():
            while True:
                ending = self._meet_once(place, reducer, on_arrival)
                if ending is not None:
                    return ending

    def _meet_once(
        self, place: MeetingPoint, reducer: Reducer | None, on_arrival: Callable[[GradientBucket], None] | None
    ) -> Ending | None:
        """One meeting; None if this rank has to wait for another."""
        present = [entry() for entry in self._reducers]
        own = [self._say(one, size, place, reducer) for one, size in zip(present, self._sizes, strict=True)]
        moves = _MOVES.get(place, 0)
        last_active = 0 if place is MeetingPoint.JOIN else self._control.rank + 1
        message = to_tensor(moves, last_active, own)
        ledger = next(one for one in (reducer, *present) if one is not None).ledger
        agreed = ledger.start(AllReduce(message, "max"), comm=self._control).wait()
        assert isinstance(agreed, torch.Tensor)
        any_moves, any_active, words = from_tensor(agreed, self._sizes)
        everyone = [(one, word, its) for one, word, its in zip(present, words, own, strict=True) if one is not None]
        if any_active:
            self.last_active = any_active - 1

        self._check(everyone, place)
        if any(word.has_dropped for _, word, _ in everyone):
            return self._follow_drops(everyone, place, reducer)
        self._weigh(everyone)
        # While a rank only asks for the weights' sum, before its backward pass, the others keep what they have.
        sending = [(one, word) for one, word, _ in everyone if word.sends and word.weighs != Weighing.AHEAD]
        for one, _ in sending:
            one.send_rest()
        at_step = next((one for one, word, _ in everyone if word.is_step), None)
        arrives = at_step is not None and at_step is reducer and all(one is at_step for one, _ in sending)
        for one, word in sending:
            one.land(word, on_arrival if arrives else None)
        if any_active and not (any_moves or any(word.sends or word.is_step for word in words)):
            self._refuse(reducer)
        if arrives and reducer is not None and not reducer.overlap_step and sending:
            return None  # what they have now is compared at the next meeting
        if place is MeetingPoint.SYNCHRONIZE and any_moves == _MOVES[MeetingPoint.PASS]:
            return None  # whoever is in a backward pass comes here, or to the step, with its gradients
        return self._go_on(everyone, place, reducer, is_over=not any_active)

    def _say(self, reducer: Reducer | None, size: int, place: MeetingPoint, meant: Reducer | None) -> Status:
        if reducer is None:
            return Status(uses=[0] * size)
        reducer.look()
        is_here = meant is None or meant is reducer
        if place is MeetingPoint.WEIGH or (reducer.overlap_step and (place is MeetingPoint.PASS or not is_here)):
            sends = False
        else:
            waits = is_here and place in (MeetingPoint.SYNCHRONIZE, MeetingPoint.STEP, MeetingPoint.JOIN)
            sends = reducer.step.phase is Phase.OPEN or (waits and reducer.has_local)
        if sends:
            if reducer.step.phase is not Phase.OPEN:
                reducer.open()
            reducer.gather_rest()
            if self.may_leave_early(reducer.channel) and (reducer.step.weight is None or reducer.step.unit is not None):
                reducer.send_rest()
        return reducer.word(place, is_here=is_here and meant is not None, sends=sends)

    def _check(self, everyone: Iterable[tuple[Reducer, Status, Status]], place: MeetingPoint) -> None:
        for one, word, _ in everyone:
            if word.min_size != word.size:
                raise UserError(
                    f"ranks train different parameters of {one.description}: {word.min_size} on one, {word.size} on "
                    "another; freeze, thaw and add them alike on all ranks"
                )
            if word.sends_in < word.epoch:
                raise UserError(
                    f"a rank has dropped the gradients of {one.description} (zero_grad) to which another rank adds: "
                    "drop them on all ranks, for instance where comm.all_reduce(flag, 'max') says so"
                )
            if word.weighs and word.is_unweighed:
                raise UserError(
                    f"some losses of {one.description} were given a weight and others were not: give all backward "
                    "passes of a step, on all ranks, one by optimizer.scale(loss, weight=...)"
                )
            if not word.is_step or word.has_dropped:
                continue
            if word.settings != word.min_settings:
                gathered = self._control.all_gather_object(None if place is MeetingPoint.JOIN else one.settings())
                theirs = {rank: settings for rank, settings in enumerate(gathered) if settings is not None}
                first = min(theirs)
                odd = next(rank for rank in theirs if theirs[rank] != theirs[first])
                raise UserError(
                    f"ranks step {one.description} with different settings: rank {first} with {theirs[first]}, "
                    f"rank {odd} with {theirs[odd]}; set them from numbers that are alike on all ranks"
                )
            if word.gradients != word.min_gradients and not word.sends:
                self._compare_gradients(one, place)

    def _compare_gradients(self, reducer: Reducer, place: MeetingPoint) -> None:
        """Ranks have changed their gradients: raise UserError unless they differ by rounding alone."""
        own = None if place is MeetingPoint.JOIN else [repr(entry) for entry in changes.sums(reducer.buckets)]
        theirs = {rank: sums for rank, sums in enumerate(self._control.all_gather_object(own)) if sums is not None}
        first = min(theirs)
        for rank, sums in theirs.items():
            if len(sums) != len(theirs[first]) or not all(map(_are_close, sums, theirs[first])):
                raise UserError(
                    f"rank {rank} has not changed the gradients of {reducer.description} between backward and step "
                    f"as rank {first} has: the replicas would part ways. Change them alike on all ranks, or before "
                    "they are averaged (inside optimizer.no_sync(), or by a hook of the parameter)"
                )

    def _follow_drops(
        self, everyone: Iterable[tuple[Reducer, Status, Status]], place: MeetingPoint, reducer: Reducer | None
    ) -> Ending | None:
        """Some rank has dropped a step's gradients, so all do; those that were about to step on them skip it.

        Where all are at that step, also those that have dropped them do, unless they have others to send.
        """
        ending = None
        for one, word, own in everyone:
            if word.has_dropped and word.is_step and one is reducer:
                if own.epoch < word.epoch:
                    one.discard()
                    one.step.number = word.epoch
                if not word.sends:
                    ending = Ending.DROPPED
                continue
            if own.epoch < word.epoch:
                one.discard()
                one.step.number = word.epoch
                if one is reducer and place is MeetingPoint.STEP:
                    ending = Ending.DROPPED
                elif not (one is reducer and place is MeetingPoint.DROP):
                    one.was_dropped = True
        return ending

    def _weigh(self, everyone: Iterable[tuple[Reducer, Status, Status]]) -> None:
        """Add up the weights of all ranks' losses, where that is wanted."""
        for one, word, _ in everyone:
            if word.weighs:
                own = torch.tensor([one.step.weight or 0.0], dtype=torch.float64)
                work = one.ledger.start(AllReduce(own, "mean"), comm=self._control)
                one.step.unit = float(work.wait())  # type: ignore[arg-type]
                one.step.weight = one.step.weight or 0.0

    def _go_on(
        self,
        everyone: Iterable[tuple[Reducer, Status, Status]],
        place: MeetingPoint,
        reducer: Reducer | None,
        *,
        is_over: bool,
    ) -> Ending | None:
        for one, word, _ in everyone:
            if word.drops:
                one.discard()
                if place is MeetingPoint.STEP and one is reducer:
                    return Ending.DROPPED
                one.was_dropped = place is not MeetingPoint.JOIN
            if word.is_step and (one is reducer or place is MeetingPoint.JOIN):
                one.agreed_vote = word.vote
                ending = Ending.TAKEN if one.step.is_sound else Ending.UNSOUND
                if place is not MeetingPoint.JOIN:
                    return ending
                one.end(ending)  # who has joined takes over the others' weights in the end
                one.clear()
        if place is MeetingPoint.JOIN:
            return Ending.TAKEN if is_over else None
        return None if place is MeetingPoint.STEP else Ending.TAKEN

    def _refuse(self, reducer: Reducer | None) -> None:
        """All ranks wait at steps, but not at the same one."""
        theirs = self._control.all_gather_object(None if reducer is None else reducer.description)
        places = [(rank, name) for rank, name in enumerate(theirs) if name is not None]
        (first, one), (second, other) = places[0], next(entry for entry in places if entry[1] != places[0][1])
        raise UserError(
            f"rank {first} is at the step of {one}, rank {second} at that of {other}: all ranks have to step the same "
            "optimizers in the same order"
        )


class _PassEnd:
    """What autograd calls at the end of a pass. It lives as long as the pass: one that has failed is forgotten."""

    def __init__(self, sequencer: Sequencer) -> None:
        self._sequencer = sequencer

    def __call__(self) -> None:
        self._sequencer._end_pass(self)


def _enclosing_backward() -> Any:
    """The node whose ``backward`` function, in Python, has called the present backward pass; None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _BACKWARD_OF_A_FUNCTION:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def _are_close(one: str, other: str) -> bool:
    """Of two numbers as text, or ``None``."""
    if one == other:
        return True
    if "None" in (one, other):
        return False
    left, right = float(one), float(other)
    return abs(left - right) <= _CLOSE * max(abs(left), abs(right))
