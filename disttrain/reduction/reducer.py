"""The reducer: hooks gather gradients into buckets, full buckets are sent during backward, and means arrive.

Rules:

* Collectives of one reducer start in the same order on all ranks: by bucket, then by program step, never by readiness.
  Those of different reducers use different channels, so they cannot be mixed up.
* Whether gradients are finite is checked before compression, and agreed on by all ranks before any state changes.
* A parameter without a gradient takes part with zeros, so that it cannot hold up other ranks. If no rank has a
  gradient of a parameter, nothing about it changes.

``meetings/sequencer.py`` brings the ranks together and says when buckets may be sent. ``step.py`` and ``bucket.py``
have the phases and stages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from disttrain.comm.base import Communicator
from disttrain.compression import Policy
from disttrain.compression.whitening import Band
from disttrain.reduction.buckets.bucket import CLOSED_STAGES, GradientBucket, NamedParameter, Slot, Stage, all_finite
from disttrain.reduction.buckets.registry import BucketRegistry
from disttrain.reduction.exchange import Exchange, Executor, finish
from disttrain.reduction.hooks import Hooks, has_user_hooks
from disttrain.reduction.late_gradients import LateGradients
from disttrain.reduction.loss_weights import LossWeights
from disttrain.reduction.measurements.ledger import Account
from disttrain.reduction.measurements.meter import Meter
from disttrain.reduction.meetings import user_changes
from disttrain.reduction.meetings.participant import ArrivalCallback
from disttrain.reduction.meetings.sequencer import Sequencer
from disttrain.reduction.meetings.status import MeetingPoint, Status, Use, decode_use
from disttrain.reduction.step import Phase, Step, StepResult

_OPEN, _GATHERING = Phase.OPEN, Stage.GATHERING  # looking up a member of an Enum class is slow for a hook


class Reducer:
    """Exchanges the gradients of some parameters between ranks.

    When a backward pass has ended, every ``parameter.grad`` is the mean over ranks, or unchanged if no rank has used
    the parameter. A further pass adds the mean of the new gradients. With ``overlap_step`` that holds only after
    ``synchronize``; until then ``parameter.grad`` is None while a gradient is being exchanged.

    Args:
        parameters: names and parameters, in the order of the model's modules; all require a gradient.
        comm: the ranks to exchange with.
        policy: chooses the compressor of each parameter.
        bucket_mb: MiB of gradient in a bucket; None leaves it to the compressor.
        frozen: parameters that do not require a gradient yet; rules of the policy may name them.
        overlap_step: wait for the means in ``synchronize``, not at the end of backward.
        description: its name in errors.

    Attributes:
        registry: the parameters and their buckets.
        meters: what measures gradients in some steps; more may be added between steps.
        results: of the last exchange, by the meters that measured it.
        is_finite_here: whether this rank's own gradients of the last exchange were finite, 0-d.
        loss_scale: gives the factor by which gradients from backward exceed the true ones. They are divided by it when
            their bucket is sent, after the check for inf and NaN, so compressors see true units only.
        rescales: whether the mean is multiplied by the loss scale again as it arrives.
        unit: mean over ranks of the weights of the losses in the last step; 1 if they had none.
        vote: what this rank tells the others with the next step, 0 to 255.
        agreed_vote: the largest vote of all ranks in the last step.
        settings: gives the optimizer's settings as text, which must be the same on all ranks at a step.
        on_nonfinite: called when gradients of any reducer are not finite, with whether they are this one's; and with
            True when a step with such gradients ends.
        channel: the wire of its collectives.
        step: the state of the step.
    """

    def __init__(
        self,
        parameters: Sequence[NamedParameter],
        comm: Communicator,
        policy: Policy,
        bucket_mb: float | None = None,
        frozen: Sequence[NamedParameter] = (),
        *,
        overlap_step: bool = False,
        description: str = "the reducer",
    ) -> None:
        self.overlap_step, self.description = overlap_step, description
        self.sequencer = Sequencer.of(comm)
        self.channel = comm.channel()
        self.executor = Executor(self.channel)
        self.registry = BucketRegistry(self.channel, policy, bucket_mb)
        self.loss_scale: Callable[[], float] = lambda: 1.0
        self.rescales = False
        self.unit = 1.0
        self.vote = self.agreed_vote = 0
        self.is_finite_here = torch.tensor(True)
        self.settings: Callable[[], str] = str
        self.on_nonfinite: Callable[[bool], None] = lambda _: None
        self.meters: list[Meter] = []
        self.results: dict[Meter, Any] = {}
        self.step = Step()
        self._is_syncing = True  # False within ``no_sync``
        self._num_ready = 0  # gradients that have come in the open exchange
        self._hooks = Hooks(self._before_accumulation, self._after_accumulation, self._launch_full_buckets)
        self._add_slots(self.registry.extend(parameters, frozen))
        self.sequencer.register(self)

    # Backward: hooks gather gradients, full buckets are launched

    @torch.no_grad()
    def _before_accumulation(self, slot: Slot) -> None:
        with self.sequencer.lock:
            if self._is_syncing:
                if not self.overlap_step:
                    self.sequencer.note_backward()
                if self.step.phase is not _OPEN:
                    self._open_exchange()
            elif self.step.phase is Phase.AVERAGED:
                for each in self.slots:
                    each.save_mean()

    @torch.no_grad()
    def _after_accumulation(self, slot: Slot) -> None:
        with self.sequencer.lock:
            stage = slot.bucket.stage
            if stage in CLOSED_STAGES:
                return  # the gradient is late, and is found where autograd put it
            slot.is_finite = None  # autograd may have added to a gradient that was checked
            slot.copy_in()
            if not self._is_syncing:
                slot.is_local = True
                return
            if stage is not _GATHERING:  # a module was moved to another dtype, so its nodes are new and have no hook
                slot.is_local = True
                self._before_accumulation(slot)
            if slot.position is None:
                slot.mark_ready(self._num_ready)
                self._num_ready += 1
            if has_user_hooks(slot.parameter):
                slot.is_finite = None

    @torch.no_grad()
    def _launch_full_buckets(self) -> None:
        """Send the next buckets in order, as far as they are full."""
        with self.sequencer.lock:
            step, buckets = self.step, self.buckets
            may_launch = self._is_syncing and step.phase is _OPEN and self.sequencer.may_leave_early(self.channel)
            if not may_launch or step.weights.is_pending:
                return
            while (index := len(step.exchanges)) < len(buckets) and buckets[index].is_full:
                step.finite_flags.append(buckets[index].close())
                step.exchanges.append(self._launch(buckets[index], step.meters))

    def _open_exchange(self) -> None:
        self.detect_user_changes()
        self.step.is_changed = self.has_changed_means
        self._num_ready = 0
        for bucket in self.buckets:
            bucket.open()
        num_steps = self.buckets[0].state.step
        is_first = self.step.num_exchanges == 0
        self.results = {}
        self.step.open(self.loss_scale(), [m for m in self.meters if is_first and m.is_due(num_steps, self.buckets)])

    def close_buckets(self) -> None:
        """Open an exchange if none is, and close all its buckets, so that it is known what this rank has."""
        if self.step.phase is not Phase.OPEN:
            self._open_exchange()
        self.step.finite_flags += [bucket.close() for bucket in self.buckets if not bucket.is_closed]

    def launch_buckets(self) -> None:
        """Close and launch all buckets that are not in flight."""
        self.close_buckets()
        for bucket in self.buckets[len(self.step.exchanges) :]:
            self.step.exchanges.append(self._launch(bucket, self.step.meters))

    def _launch(self, bucket: GradientBucket, meters: Sequence[Meter] = ()) -> Exchange:
        account = Account(bucket.current_compressor.name, self.buckets.index(bucket), bucket.description)
        gradient = bucket.gradient(self.step.scale * (self.step.weights.mean or 1.0))
        for meter in meters:
            meter.before_exchange(bucket, gradient)
        return Exchange(bucket.launch(gradient), self.executor, account)

    # Arrival

    @torch.no_grad()
    def finalize(self, agreed: Status, on_arrival: ArrivalCallback | None = None) -> None:
        """Wait for the exchange; every ``parameter.grad`` is the mean over ranks then.

        Args:
            agreed: what the ranks have agreed on.
            on_arrival: called with each bucket as its mean arrives, while later ones are in flight. Only gradients of
                this bucket are set then. Not called if gradients are not finite or a second exchange follows.
        """
        step, is_finite = self.step, not agreed.is_nonfinite
        uses = {slot: decode_use(agreed.uses[slot.index]) for slot in self.slots}
        late = LateGradients(self.buckets, {slot: use for slot, (use, _) in uses.items()})
        step.has_stepped = is_finite and not late and on_arrival is not None
        new, keep = step.weights.combine()
        scale = new * (step.scale if self.rescales else 1.0)
        for index, outcome in finish(step.exchanges):
            bucket = self.buckets[index]
            used = [uses[slot][0] is not Use.UNUSED for slot in bucket.slots]
            if is_finite:
                for meter in step.meters:
                    meter.after_exchange(bucket, outcome[0])
                bucket.finalize(*outcome, used, scale, keep)
            else:
                bucket.finalize_nonfinite(used)
            bucket.expose()
            if step.has_stepped and on_arrival is not None:
                on_arrival(bucket)
                bucket.hide()
        if is_finite:
            late.exchange(self._launch, scale)
        for bucket in self.buckets if step.has_stepped else ():
            bucket.expose()
        self.results = {meter: meter.result(is_finite and not late) for meter in step.meters}
        self.registry.note_uses(uses, is_finite=is_finite)
        self.unit = step.weights.past or 1.0
        step.finalize(is_finite=is_finite, version=user_changes.version(self.slots))
        if not is_finite:
            self.sequencer.tell_nonfinite(self)

    # The step

    def synchronize(self) -> bool:
        """Wait until every ``parameter.grad`` is the mean over ranks. A collective.

        Returns:
            Whether the gradients are finite. If any rank's are not, those of all ranks are NaN.
        """
        self.sequencer.meet(MeetingPoint.SYNCHRONIZE, self)
        return self.step.is_finite and not self.step.follows_drop

    def agree_on_step(self, on_arrival: ArrivalCallback | None = None) -> StepResult:
        """Wait until all ranks are at the step, and return what all are to do. A collective.

        ``end_step`` follows, unless the step was dropped.
        """
        if self.step.follows_drop:
            self.step.follows_drop = False
            return StepResult.DROPPED
        return self.sequencer.meet(MeetingPoint.STEP, self, on_arrival)

    def end_step(self, result: StepResult) -> None:
        """End the step and start a new one. A step that was not taken leaves no trace in the compressors' state."""
        step = self.step
        is_taken = result is StepResult.TAKEN and step.is_finite and step.num_exchanges > 0
        for bucket in self.buckets:
            bucket.release(is_taken=is_taken, refresh_next=step.refresh_next)
        if not step.is_finite:
            self.on_nonfinite(True)
        self.step = Step(step.number + 1)
        self.executor.ledger.end_step(self.registry.num_elements)

    def discard_step(self, *, number: int | None = None, is_known: bool = True) -> None:
        """End the step and remove its gradients, because some rank has dropped it.

        Args:
            number: of the step that follows; by default the next one.
            is_known: whether this rank's script knows; otherwise its next ``step`` is skipped.
        """
        for slot in self.slots:
            slot.discard()
        self.end_step(StepResult.DROPPED)
        self.step.number = self.step.number if number is None else number
        self.step.follows_drop = not is_known

    def drop_gradients(self) -> None:
        """Drop this rank's gradients of the step. If an exchange is open, all ranks drop theirs: a collective then."""
        self.step.follows_drop = False
        self.detect_user_changes()
        # The weight may be that of a loss whose backward pass has not started: it is dropped only with gradients.
        if self.step.phase is Phase.OPEN or any(slot.is_local for slot in self.slots):
            self.step.weights.clear()
        for slot in self.slots:
            slot.is_local = False
        if self.step.phase is Phase.OPEN:
            self.sequencer.meet(MeetingPoint.DROP, self)
            self.step.follows_drop = False
        elif self.step.phase is Phase.AVERAGED:
            weights = self.step.weights
            self.end_step(StepResult.DROPPED)
            self.step.weights = LossWeights(weights.local, weights.mean)

    def clear_gradients(self) -> None:
        """Remove gradients that were stepped on."""
        for slot in self.slots:
            if not slot.is_local and self.step.phase is Phase.EMPTY:
                slot.parameter.grad = None

    def add_loss_weight(self, weight: float) -> None:
        """Add the weight of a loss of the next exchange. A collective, unless within ``no_sync``."""
        self.detect_user_changes()  # first, as it may end the step
        self.step.weights.add(weight)
        if self._is_syncing:
            self.sequencer.meet(MeetingPoint.WEIGHT, self)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients locally within; the first backward pass outside sends the sum."""
        before, self._is_syncing = self._is_syncing, False
        try:
            yield
        finally:
            self._is_syncing = before

    # What ranks report when they meet

    @property
    def has_sent(self) -> bool:
        """Whether buckets are in flight."""
        return bool(self.step.exchanges)

    @property
    def has_local_gradients(self) -> bool:
        """Whether there are gradients that the other ranks have not seen, and that are not in an open exchange."""
        return any(slot.has_local for slot in self.slots)

    @property
    def has_changed_means(self) -> bool:
        """Whether the user has changed the mean since it arrived in this step."""
        is_averaged = self.step.phase is Phase.AVERAGED
        return self.step.is_changed or (is_averaged and any(bucket.is_changed for bucket in self.buckets))

    @property
    def band(self) -> Band:
        """How this rank's whitened gradients compare with the second moments."""
        bands = {bucket.whitening.band for bucket in self.buckets if bucket.whitening is not None}
        return next((one for one in (Band.ABOVE, Band.BELOW, Band.WITHIN) if one in bands), Band.NOTHING)

    def detect_user_changes(self) -> None:
        """Notice unfrozen parameters, and gradients that were dropped or stepped on by other means."""
        self.unfreeze()
        if self.step.phase is Phase.AVERAGED and user_changes.are_dropped(self.buckets):
            was_stepped_on = self.step.version != user_changes.version(self.slots)
            self.end_step(StepResult.TAKEN if was_stepped_on else StepResult.DROPPED)

    def check_finite(self) -> bool:
        """Whether all gradients of this rank in the open exchange, whose buckets are closed, are finite."""
        self.is_finite_here = torch.stack([flag.cpu() for flag in self.step.finite_flags]).all()
        late = (slot.parameter.grad for slot in self.slots if slot.parameter.grad is not None)
        return bool(self.is_finite_here) and all(bool(all_finite(gradient)) for gradient in late)

    # Parameters

    @property
    def buckets(self) -> list[GradientBucket]:
        """In the order in which they are sent."""
        return self.registry.buckets

    @property
    def slots(self) -> list[Slot]:
        return self.registry.slots

    @property
    def num_parameters(self) -> int:
        """Number of parameters, frozen ones included."""
        return self.registry.num_parameters

    def extend(self, parameters: Sequence[NamedParameter], frozen: Sequence[NamedParameter]) -> None:
        """Add parameters. To be called on all ranks between steps."""
        self._add_slots(self.registry.extend(parameters, frozen))
        self.sequencer.resize(self)

    def unfreeze(self) -> None:
        """Add the frozen parameters that require a gradient by now."""
        self._add_slots(self.registry.unfreeze())

    def _add_slots(self, slots: Sequence[Slot]) -> None:
        self._hooks.add(slots)
        if self.step.phase is Phase.OPEN:
            for bucket in {slot.bucket for slot in slots}:
                bucket.open()

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        self._hooks.remove()
