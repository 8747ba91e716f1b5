"""The reducer: hooks gather gradients into buckets, full buckets leave while backward goes on, means come back.

Rules that it keeps:

* Collectives start in one order on all ranks - by bucket, then by program step - never by who is ready first.
* Whether a step counts is judged on raw gradients and agreed on by all ranks before any state changes.
* A parameter without a gradient takes part with zeros, so it cannot hold up the others.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch.utils.hooks import RemovableHandle

from disttrain.collectives import AllReduce
from disttrain.comm.base import Communicator
from disttrain.compression import Policy
from disttrain.compression.base import Hierarchy
from disttrain.reduction.bucket import GradientBucket, NamedParameter, Slot, build_buckets
from disttrain.reduction.exchange import Exchange, Outcome, finish, rehearse
from disttrain.reduction.ledger import Account, Ledger
from disttrain.reduction.meter import Meter
from disttrain.reduction.norms import Every, NormMeter, SquaredNorms

logger = logging.getLogger(__name__)


class Reducer:
    """Exchanges the gradients of some parameters between ranks.

    Until its bucket leaves, ``parameter.grad`` is a view of the bucket's buffer. While the bucket is on the wire it is
    None, so nothing can write into what travels: a further backward pass leaves its gradient there, and ``synchronize``
    sends it after the first. After ``synchronize`` it is the mean over ranks, or None where no rank had a gradient.

    Args:
        parameters: names and parameters, in the order of the model's modules; all require a gradient.
        comm: the ranks to exchange with.
        policy: which compressor exchanges which of them.
        bucket_mb: MiB of gradient in a bucket; None leaves it to the compressor.
        later: those that ``add`` may bring; rules may be for them.
        norms_every: steps between two in which the gradients' norms are measured; "auto" chooses, None never does.

    Attributes:
        meters: what looks at gradients in some steps; any may be added between two.
        results: of the last step, by the meters that measured it.
        is_finite_here: whether this rank's own gradients of the last step were finite, 0-d.
        scale: gradients from backward are so many times the true ones. They are divided by it as their bucket leaves,
            after the look at whether they are finite, so compressors and their residuals know true units alone.
        vote: what this rank tells the others with the next exchange, 0 to 255; it travels with what is agreed on.
        agreed_vote: the largest vote of all ranks in the last exchange.
    """

    def __init__(
        self,
        parameters: Sequence[NamedParameter],
        comm: Communicator,
        policy: Policy,
        bucket_mb: float | None = None,
        later: Sequence[NamedParameter] = (),
        norms_every: Every | None = None,
    ) -> None:
        self.buckets: list[GradientBucket] = []
        self.ledger = Ledger(comm)
        self._comm, self._policy, self._bucket_mb = comm, policy, bucket_mb
        self._all = (*parameters, *later)
        self._hierarchy = _hierarchy(comm) if policy.hierarchical else None
        self._slots: list[Slot] = []
        self._num_elements = 0
        self._hooks: list[RemovableHandle] = []
        self.scale = 1.0
        self.vote = self.agreed_vote = 0
        self.is_finite_here = torch.tensor(True)
        self.meters: list[Meter] = []
        self.results: dict[Meter, Any] = {}
        self._measuring: list[Meter] = []  # of the step under way
        self._norm_meter = None if norms_every is None else NormMeter(norms_every, self.ledger, comm)
        if self._norm_meter is not None:
            self.meters.append(self._norm_meter)
        self._sending = True
        self._sent: list[Exchange] = []  # of the buckets that have left, by index
        self._finite: list[torch.Tensor] = []  # one flag for each of them
        self._warned_late = False
        self.add(parameters)

    def add(self, parameters: Sequence[NamedParameter]) -> None:
        """Exchange more parameters from now on, in buckets of their own behind the present ones.

        Those keep their members, their state and, in a hierarchical exchange, their owners. Nothing may be on the wire.
        """
        assert not self._sent
        names = {name for name, _ in parameters}
        buckets = build_buckets(
            parameters,
            self._policy,
            rank=self._comm.rank,
            world_size=self._comm.world_size,
            bucket_mb=self._bucket_mb,
            hierarchy=self._hierarchy,
            others=[member for member in self._all if member[0] not in names],
        )
        for kind in {(bucket.compressor, bucket.description.dtype, bucket.flat.device) for bucket in buckets}:
            rehearse(*kind, self._comm.world_size)
        for bucket in buckets:
            bucket.state.step = self.buckets[0].state.step if self.buckets else 0  # ramps and warm-ups are the run's
        slots = [slot for bucket in buckets for slot in bucket.slots]
        self._hooks += [slot.parameter.register_post_accumulate_grad_hook(self._make_hook(slot)) for slot in slots]
        self.buckets = [*self.buckets, *buckets]
        self._slots += slots
        self._num_elements += sum(bucket.description.numel for bucket in buckets)

    @property
    def has_sent(self) -> bool:
        """Whether something is on the wire."""
        return bool(self._sent)

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only add up local gradients; the first one outside sends the sum."""
        before, self._sending = self._sending, False
        try:
            yield
        finally:
            self._sending = before

    def _make_hook(self, slot: Slot) -> Callable[[torch.Tensor], None]:
        def on_gradient(_: torch.Tensor) -> None:
            bucket = slot.bucket
            if bucket.has_left:
                return  # this gradient is late: ``synchronize`` finds it where autograd put it
            slot.finite = None  # autograd may have added to what was looked at
            slot.take_in()
            if self._sending and not slot.ready:
                slot.ready = True
                bucket.num_ready += 1
                self._send_full()

        return on_gradient

    def _send_full(self) -> None:
        """Send the buckets that are next in order, as far as they are full."""
        while len(self._sent) < len(self.buckets) and self.buckets[len(self._sent)].is_full:
            self._send(self.buckets[len(self._sent)])

    def _send(self, bucket: GradientBucket) -> None:
        if not self._sent:
            step = self.buckets[0].state.step
            self._measuring = [meter for meter in self.meters if meter.is_due(step, self.buckets)]
        for slot in bucket.slots:
            slot.take_in()
            slot.used = slot.parameter.grad is not None
        bucket.hide_gradients()
        bucket.has_left = True
        known = [slot.finite for slot in bucket.slots]
        self._finite.append(_all_finite(bucket.flat) if None in known else torch.tensor(all(known)))
        self._sent.append(self._start(bucket))

    def _start(self, bucket: GradientBucket) -> Exchange:
        account = Account(bucket.present.name, self.buckets.index(bucket), bucket.description)
        gradient = bucket.gradient(self.scale)
        for meter in self._measuring:
            meter.leave(bucket, gradient)
        return Exchange(bucket.program(gradient), self.ledger, account)

    @property
    def norms(self) -> SquaredNorms | None:
        """Of the last step, if it was measured and sound."""
        return None if self._norm_meter is None else self.results.get(self._norm_meter)

    def measure_first_pass(self) -> None:
        """In one process, where several backward passes make a step: take what the first gave as a part of the batch.

        To be called inside ``no_sync``, after that pass. It does nothing with more processes, or if no norms are due.
        """
        meter = self._norm_meter
        if meter is None or self._comm.world_size > 1:
            return
        if meter.is_due(self.buckets[0].state.step, self.buckets):
            grads = [grad for slot in self._slots if (grad := slot.parameter.grad) is not None]
            meter.first_pass([grad.to_dense() for grad in grads], self.scale)

    def synchronize(self, on_arrival: Callable[[GradientBucket], None] | None = None) -> bool:
        """Finish the exchange; every ``parameter.grad`` is then the mean over ranks.

        Args:
            on_arrival: called with each bucket of a sound step as its means arrive, while later ones are still on the
                wire. Only the gradients of this bucket are set then. Not called if a second exchange has to follow.

        Returns:
            Whether the step is sound. If any rank had a gradient with an inf or NaN, no compressor state has changed,
            and the gradients of all ranks are NaN.
        """
        late = [bucket.has_left and bucket.has_gradient for bucket in self.buckets]
        for slot in self._slots:
            if slot.bucket.has_left and slot.parameter.grad is not None:
                slot.used = True
                self._finite.append(_all_finite(slot.parameter.grad))
        for bucket in self.buckets[len(self._sent) :]:
            for slot in bucket.slots:
                slot.finite = None  # the user may have changed gradients since backward
            self._send(bucket)
        agreement = self.ledger.start(AllReduce(self._local_flags(late), "max"), priority=True)
        arrivals: Iterable[tuple[int, Outcome]] = finish(self._sent)
        if not self._comm.priority_overtakes:
            arrivals = list(arrivals)  # the agreement comes last anyway
        unsound, self.agreed_vote, *flags = cast("torch.Tensor", agreement.wait()).tolist()
        late, used = flags[: len(self.buckets)], flags[len(self.buckets) :]
        for slot, is_used in zip(self._slots, used, strict=True):
            slot.used = bool(is_used)

        for index, outcome in arrivals:
            bucket = self.buckets[index]
            if unsound:
                bucket.flat.fill_(math.nan)
                continue
            for meter in self._measuring:
                meter.land(bucket, outcome[0])
            bucket.land(*outcome)
            if on_arrival is not None and not any(late):
                bucket.show_gradients()
                on_arrival(bucket)
                bucket.hide_gradients()
        measured, self._measuring = self._measuring, []
        if any(late) and not unsound:
            self._exchange_late([bucket for bucket, is_late in zip(self.buckets, late, strict=True) if is_late])
        for bucket in self.buckets:
            bucket.show_gradients()
            for slot in bucket.slots:
                slot.ready = False
            bucket.num_ready, bucket.has_left = 0, False
        self._sent, self._finite = [], []
        is_whole = not unsound and not any(late)
        self.results = {meter: meter.finish(is_whole) for meter in measured}
        self.ledger.end_step(self._num_elements)
        return not unsound

    def _local_flags(self, late: list[bool]) -> torch.Tensor:
        """What ranks must agree on, as one small tensor: unsound, their vote, late (by bucket), used (by parameter)."""
        finite = torch.stack([flag.to(self._comm.control_device) for flag in self._finite]).all()
        flags = [0, self.vote, *late, *(slot.used for slot in self._slots)]
        agreed = torch.tensor(flags, dtype=torch.uint8, device=finite.device)
        agreed[0] = ~finite
        self.is_finite_here = finite
        return agreed

    def _exchange_late(self, buckets: Sequence[GradientBucket]) -> None:
        """Send what backward passes added after their bucket had left, and add its mean."""
        if not self._warned_late:
            self._warned_late = True
            logger.warning(
                "several backward passes before one step: gradients were sent twice. "
                "Put all but the last under optimizer.no_sync() to send their sum once."
            )
        first_means = [bucket.flat.clone() for bucket in buckets]
        for bucket in buckets:
            for slot in bucket.slots:
                slot.take_in()
        for index, outcome in finish([self._start(bucket) for bucket in buckets]):
            buckets[index].land(*outcome)
            buckets[index].flat.add_(first_means[index])


def _hierarchy(comm: Communicator) -> Hierarchy:
    node, across = comm.group("node"), comm.group("across")
    return Hierarchy(node.rank, node.world_size, across.rank, across.world_size)


def _all_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether there is no inf and no NaN, as a 0-d tensor on the same device (so that a GPU need not be waited for)."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.device.type == "cpu" and math.isfinite(tensor.sum(dtype=_wide(tensor.dtype)).item()):
        return torch.tensor(True)  # a finite sum proves it in one pass; an overflown one needs the second look
    return torch.isfinite(tensor).all()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
