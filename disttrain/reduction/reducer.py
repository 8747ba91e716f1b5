"""The reducer: hooks gather gradients into buckets, full buckets leave while backward goes on, means come back.

Rules that it keeps:

* Collectives of one reducer start in one order on all ranks - by bucket, then by program step - never by who is ready
  first. Those of different reducers travel on different channels, so they cannot meet.
* Whether gradients count is judged on raw ones and agreed on by all ranks before any state changes.
* A parameter without a gradient takes part with zeros, so it cannot hold up the others; of one that no rank has used,
  nothing changes.

The sequencer says when: it brings the ranks together (``sequencer.py``).
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from disttrain.comm.base import Communicator
from disttrain.compression import Policy
from disttrain.reduction.bucket import GradientBucket, NamedParameter, Slot, all_finite
from disttrain.reduction.exchange import Exchange, finish
from disttrain.reduction.hooks import Hooks, has_others
from disttrain.reduction.measurements.ledger import Account, Ledger
from disttrain.reduction.measurements.meter import Meter
from disttrain.reduction.meetings import changes
from disttrain.reduction.meetings.sequencer import MeetingPoint, Sequencer
from disttrain.reduction.meetings.status import Status, Use, Weighing, decode_use, encode_use, signed
from disttrain.reduction.members import Members
from disttrain.reduction.step import Ending, Phase, Step


class Reducer:
    """Exchanges the gradients of some parameters between ranks.

    When a backward pass has ended, every ``parameter.grad`` is the mean over ranks, or what it was before if no rank
    has used the parameter. A further pass adds the mean of what is new. With ``overlap_step`` that is so only after
    ``synchronize``; until then ``parameter.grad`` is None where a gradient is on its way.

    Args:
        parameters: names and parameters, in the order of the model's modules; all require a gradient.
        comm: the ranks to exchange with.
        policy: which compressor exchanges which of them.
        bucket_mb: MiB of gradient in a bucket; None leaves it to the compressor.
        later: those that do not require a gradient yet; rules may be for them.
        overlap_step: leave the wait for the means to ``synchronize``.
        describe: what other ranks' errors are to call it.

    Attributes:
        members: the parameters and their buckets.
        meters: what looks at gradients in some steps; any may be added between two.
        results: of the last step, by the meters that measured it.
        is_finite_here: whether this rank's own gradients of the last exchange were finite, 0-d.
        loss_scale: gives how many times the true ones the gradients from backward are. They are divided by it as their
            bucket leaves, once it is known whether they are finite, so compressors know true units alone.
        unit: mean over ranks of the weights of the losses in the last step; 1 if they had none.
        rescales: whether the means are multiplied by it again as they arrive.
        vote: what this rank tells the others with the next step, 0 to 255; it travels with what is agreed on.
        agreed_vote: the largest vote of all ranks in the last step.
        settings: gives what must be alike on all ranks where they step, as text.
        on_unsound: called when gradients turn out to be unsound, and again when their step ends; with False where they
            are another reducer's, whose backward pass may have gone through this one's model.
        channel: what its collectives travel on.
    """

    def __init__(
        self,
        parameters: Sequence[NamedParameter],
        comm: Communicator,
        policy: Policy,
        bucket_mb: float | None = None,
        later: Sequence[NamedParameter] = (),
        *,
        overlap_step: bool = False,
        describe: str = "the reducer",
    ) -> None:
        self.overlap_step, self.description = overlap_step, describe
        self.sequencer = Sequencer.of(comm)
        self.channel = comm.channel()
        self.ledger = Ledger(self.channel)
        self.members = Members(self.channel, policy, bucket_mb)
        self._hooks = Hooks(self._before, self._after, self._send_full)
        self.loss_scale: Callable[[], float] = lambda: 1.0
        self.rescales, self._rescale = False, 1.0
        self.unit = 1.0
        self.vote = self.agreed_vote = 0
        self.is_finite_here = torch.tensor(True)
        self.settings: Callable[[], str] = str
        self.on_unsound: Callable[[bool], None] = lambda _: None
        self.meters: list[Meter] = []
        self.results: dict[Meter, Any] = {}
        self.step = Step()
        self.was_dropped = False  # by another rank, since this one last stepped or dropped
        self._sending = True
        self._num_ready = 0  # gradients that have come in the exchange under way
        self._hooks.add(self.members.extend(parameters, later))
        self.sequencer.register(self)

    # Members

    @property
    def buckets(self) -> list[GradientBucket]:
        """In the order in which they leave."""
        return self.members.buckets

    @property
    def slots(self) -> list[Slot]:
        return self.members.slots

    def extend(self, parameters: Sequence[NamedParameter], later: Sequence[NamedParameter]) -> None:
        """Parameters that the optimizer did not have before; to be called by all ranks between steps."""
        self._hooks.add(self.members.extend(parameters, later))
        self.sequencer.resize(self)

    def unfreeze(self) -> None:
        """Take in the parameters that have come to require a gradient."""
        self._hooks.add(self.members.unfreeze())

    def close(self) -> None:
        """Take the hooks off the parameters."""
        self._hooks.remove()

    # Backward

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only add up local gradients; the first one outside sends the sum."""
        before, self._sending = self._sending, False
        try:
            yield
        finally:
            self._sending = before

    @torch.no_grad()
    def _before(self, slot: Slot) -> None:
        with self.sequencer.lock:
            if not self._sending:
                if self.step.phase is Phase.LANDED:
                    for each in self.slots:
                        each.note_mean()
            else:
                if not self.overlap_step:
                    self.sequencer.note_backward()
                if self.step.phase is not Phase.OPEN:
                    self.open()

    @torch.no_grad()
    def _after(self, slot: Slot) -> None:
        with self.sequencer.lock:
            if slot.bucket.has_left:
                return  # this gradient is late: it is found where autograd put it
            slot.finite = None  # autograd may have added to what was looked at
            slot.take_in()
            if not self._sending:
                slot.is_local = True
                return
            if self.step.phase is not Phase.OPEN:  # a module was moved to another dtype, and has new nodes
                slot.is_local = True
                self._before(slot)
            if not slot.is_ready:
                slot.is_ready, slot.position = True, self._num_ready
                self._num_ready += 1
            if has_others(slot.parameter):
                slot.finite = None

    @torch.no_grad()
    def _send_full(self) -> None:
        """Send the buckets that are next in order, as far as they are full."""
        with self.sequencer.lock:
            step = self.step
            if not (self._sending and step.phase is Phase.OPEN and self.sequencer.may_leave_early(self.channel)):
                return
            if step.weight is not None and step.unit is None:
                return
            while len(step.exchanges) < len(self.buckets) and self.buckets[len(step.exchanges)].is_full:
                self._gather(self.buckets[len(step.exchanges)])
                self._start(self.buckets[len(step.exchanges)])

    def open(self) -> None:
        """Begin an exchange."""
        self.look()
        self.step.is_changed |= self._is_changed
        step, self.was_dropped, self._num_ready = self.step, False, 0
        step.phase, step.exchanges, step.finite = Phase.OPEN, [], []
        for bucket in self.buckets:
            bucket.open()
        self.results, step.scale = {}, self.loss_scale()
        first = self.buckets[0].state.step
        step.measuring = [] if step.num_exchanges else [m for m in self.meters if m.is_due(first, self.buckets)]

    def _gather(self, bucket: GradientBucket) -> None:
        self.step.finite.append(bucket.close())

    def gather_rest(self) -> None:
        """Close the buckets that have not left, so that it is known what this rank has."""
        for bucket in self.buckets:
            if not bucket.has_left:
                self._gather(bucket)

    def send_rest(self) -> None:
        """Start the exchange of all buckets that have not left."""
        if self.step.phase is not Phase.OPEN:
            self.open()
        self.gather_rest()
        for bucket in self.buckets[len(self.step.exchanges) :]:
            self._start(bucket)

    def _start(self, bucket: GradientBucket) -> None:
        self.step.exchanges.append(self._exchange(bucket, self.step.measuring))

    def _exchange(self, bucket: GradientBucket, measuring: Sequence[Meter]) -> Exchange:
        account = Account(bucket.present.name, self.buckets.index(bucket), bucket.description)
        gradient = bucket.gradient(self.step.scale * (self.step.unit or 1.0))
        for meter in measuring:
            meter.leave(bucket, gradient)
        return Exchange(bucket.program(gradient), self.ledger, account)

    # What the sequencer asks for

    def look(self) -> None:
        """Notice what the user has done since: dropped all gradients, or stepped by other means."""
        self.unfreeze()
        if self.step.phase is not Phase.LANDED:
            return
        if changes.are_dropped(self.buckets):
            self.end(Ending.DROPPED if self.step.version == changes.version(self.slots) else Ending.TAKEN)

    @property
    def has_local(self) -> bool:
        """Whether there are gradients that the other ranks have not seen, and that are not under way."""
        return any(slot.has_local for slot in self.slots)

    def word(self, place: MeetingPoint, *, is_here: bool, sends: bool) -> Status:
        """What this rank says of it. If it ``sends``, all buckets are closed."""
        step = self.step
        uses = [0] * self.members.num_parameters
        word = Status(epoch=step.number, sends=sends, vote=self.vote, size=len(self.slots), uses=uses)
        word.is_elsewhere = place is not MeetingPoint.JOIN and not (place is MeetingPoint.STEP and is_here)
        if place is MeetingPoint.STEP and is_here:
            word.steps = 1
            word.settings = signed(zlib.crc32(self.settings().encode()))
            is_changed = step.is_changed or self._is_changed
            word.gradients = signed(zlib.crc32(repr(changes.sums(self.buckets)).encode())) if is_changed else 0
        word.drops = place is MeetingPoint.DROP and is_here
        if sends:
            finite = torch.stack([flag.cpu() for flag in step.finite]).all()
            self.is_finite_here = finite
            word.is_unsound = not finite
            for slot in self.slots:
                if slot.parameter.grad is not None:  # late
                    word.is_unsound |= not bool(all_finite(slot.parameter.grad))
                uses[slot.index] = encode_use(slot.use, slot.position)
        if place is MeetingPoint.WEIGH and is_here:
            word.weighs = Weighing.AHEAD
        elif sends and step.weight is not None and step.unit is None:
            word.weighs = Weighing.NOW
        word.is_unweighed = sends and step.weight is None and any(word.uses)
        return word

    @property
    def _is_changed(self) -> bool:
        return self.step.phase is Phase.LANDED and any(bucket.is_changed for bucket in self.buckets)

    @torch.no_grad()
    def land(self, word: Status, on_arrival: Callable[[GradientBucket], None] | None = None) -> None:
        """Finish the exchange: every ``parameter.grad`` is then the mean over ranks.

        Args:
            word: what the ranks have agreed on.
            on_arrival: called with each bucket of a sound exchange as its means arrive, while later ones are still on
                the wire. Only the gradients of this bucket are set then. Not called if a second exchange follows.
        """
        step, is_sound = self.step, not word.is_unsound
        uses = {slot: decode_use(word.uses[slot.index]) for slot in self.slots}
        used = {bucket: [uses[slot][0] is not Use.UNUSED for slot in bucket.slots] for bucket in self.buckets}
        late = [bucket for bucket in self.buckets if any(uses[slot][0] is Use.LATE for slot in bucket.slots)]
        late_gradients = {slot: slot.parameter.grad for bucket in late for slot in bucket.slots}
        arrives = on_arrival if is_sound and not late else None
        share, keep = step.shares()
        self._rescale = share * (step.scale if self.rescales else 1.0)
        for index, outcome in finish(step.exchanges):
            bucket = self.buckets[index]
            if not is_sound:
                bucket.spoil(used[bucket])
                continue
            for meter in step.measuring:
                meter.land(bucket, outcome[0])
            bucket.land(*outcome, used[bucket], self._rescale, keep)
            if arrives is not None:
                bucket.show()
                arrives(bucket)
                bucket.hide()
        if late and is_sound:
            self._exchange_late(late, late_gradients, {slot for slot, (use, _) in uses.items() if use is Use.LATE})
        if arrives is not None:
            for bucket in self.buckets:
                bucket.show()
        self.results = {meter: meter.finish(is_sound and not late) for meter in step.measuring}
        for slot in self.slots:
            slot.idle = slot.idle + 1 if uses[slot][0] is Use.UNUSED else 0
        if is_sound:
            self.members.put_in_order({slot: at for slot, (use, at) in uses.items() if use is not Use.UNUSED})
        step.phase, step.exchanges, step.measuring = Phase.LANDED, [], []
        step.is_sound &= is_sound
        step.num_exchanges += 1
        self.unit = step.past_unit or 1.0
        step.weight = step.unit = None
        step.version = changes.version(self.slots)
        if not is_sound:
            self.sequencer.tell_unsound(self)

    def _exchange_late(
        self, buckets: Sequence[GradientBucket], gradients: dict[Slot, torch.Tensor | None], slots: set[Slot]
    ) -> None:
        """Send what came after its bucket had left, and add its mean."""
        for bucket in buckets:
            bucket.open()
            for slot in bucket.slots:
                slot.parameter.grad = gradients[slot]
            bucket.close()
        for index, outcome in finish([self._exchange(bucket, ()) for bucket in buckets]):
            buckets[index].land(*outcome, [slot in slots for slot in buckets[index].slots], self._rescale)

    def end(self, ending: Ending) -> None:
        """Begin a new step. Of one that was not taken no trace is left in the compressors' state."""
        taken = ending is Ending.TAKEN and self.step.is_sound
        for bucket in self.buckets:
            if taken and self.step.num_exchanges:
                bucket.settle()
            else:
                bucket.state.rollback()
        for slot in self.slots:
            slot.has_mean, slot.base = False, None
        if not self.step.is_sound:
            self.on_unsound(True)
        self.step = Step(self.step.number + 1)
        self.ledger.end_step(self.members.num_elements)

    def weigh(self, weight: float) -> None:
        """Give the losses of the next exchange a weight more. A collective, unless within ``no_sync``."""
        self.step.weight = (self.step.weight or 0.0) + weight
        if self._sending:
            self.sequencer.meet(MeetingPoint.WEIGH, self)

    def clear(self) -> None:
        """Remove gradients that were stepped on."""
        for slot in self.slots:
            if not slot.is_local and self.step.phase is Phase.EMPTY:
                slot.parameter.grad = None

    def discard(self) -> None:
        """End the step because a rank has dropped it: no gradient of it is left."""
        for slot in self.slots:
            slot.parameter.grad = slot.carried = slot.base = None
            slot.has_mean = slot.is_local = False
        self.end(Ending.DROPPED)

    # What an optimizer asks for

    @property
    def has_sent(self) -> bool:
        """Whether something is on the wire."""
        return bool(self.step.exchanges)

    def synchronize(self) -> bool:
        """Wait until every ``parameter.grad`` is the mean over ranks. A collective.

        Returns:
            Whether they are sound. If any rank had a gradient with an inf or NaN, the gradients of all ranks are NaN.
        """
        self.sequencer.meet(MeetingPoint.SYNCHRONIZE, self)
        return self.step.is_sound and not self.was_dropped

    def take(self, on_arrival: Callable[[GradientBucket], None] | None = None) -> Ending:
        """Come together for a step: what all ranks are to do with it. ``end`` follows unless it is dropped."""
        if self.was_dropped:
            self.was_dropped = False
            return Ending.DROPPED
        return self.sequencer.meet(MeetingPoint.STEP, self, on_arrival)

    def drop(self) -> None:
        """Drop this rank's gradients of the step. What is on the wire is dropped by all ranks."""
        self.was_dropped = False
        self.look()
        # A weight may belong to a loss whose backward pass is yet to come: it goes only with gradients.
        if self.step.phase is Phase.OPEN or any(slot.is_local for slot in self.slots):
            self.step.weight = self.step.unit = None
        for slot in self.slots:
            slot.is_local = False
        if self.step.phase is Phase.OPEN:
            self.sequencer.meet(MeetingPoint.DROP, self)
            self.was_dropped = False
        elif self.step.phase is Phase.LANDED:
            weight, unit = self.step.weight, self.step.unit
            self.end(Ending.DROPPED)
            self.step.weight, self.step.unit = weight, unit
