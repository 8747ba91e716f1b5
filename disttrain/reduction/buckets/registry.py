"""The parameters of a reducer and their buckets. More may be added between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from disttrain.comm.base import Communicator
from disttrain.compression import Policy
from disttrain.compression.base import Hierarchy
from disttrain.reduction.buckets.bucket import GradientBucket, NamedParameter, Slot
from disttrain.reduction.buckets.bucketing import build_buckets
from disttrain.reduction.exchange import rehearse
from disttrain.reduction.meetings.status import Use


class BucketRegistry:
    """The buckets of the parameters that require a gradient, and the parameters that are frozen so far.

    Args:
        comm: the ranks to exchange with.
        policy: chooses the compressor of each parameter.
        bucket_mb: MiB of gradient in a bucket; None leaves it to the compressor.

    Attributes:
        buckets: in the order in which they are sent.
        slots: of all buckets.
    """

    def __init__(self, comm: Communicator, policy: Policy, bucket_mb: float | None) -> None:
        self.buckets: list[GradientBucket] = []
        self.slots: list[Slot] = []
        self._comm, self._policy, self._bucket_mb = comm, policy, bucket_mb
        self._hierarchy = _hierarchy(comm) if policy.hierarchical else None
        self._all: list[NamedParameter] = []
        self._frozen: list[NamedParameter] = []
        self._is_ordered = False

    @property
    def num_parameters(self) -> int:
        """Number of parameters, frozen ones included."""
        return len(self._all)

    @property
    def num_elements(self) -> int:
        """Number of elements of the gradients that are exchanged."""
        return sum(bucket.description.numel for bucket in self.buckets)

    @property
    def keeps_residuals(self) -> bool:
        """Whether compressors keep state that differs by rank, in units of the gradient."""
        states = [bucket.state.tensors.values() for bucket in self.buckets]
        return any(kept.tensor.numel() and not kept.replicated for its in states for kept in its)

    @property
    def has_newly_unused(self) -> bool:
        """Whether the last exchange was the first in a row without some parameter: it may have been replaced."""
        return any(slot.num_unused == 1 for slot in self.slots)

    def extend(self, parameters: Sequence[NamedParameter], frozen: Sequence[NamedParameter]) -> list[Slot]:
        """Add parameters; those that are ``frozen`` get no bucket yet. Return the new slots."""
        self._all += [*parameters, *frozen]
        self._frozen += frozen
        return self._add(parameters)

    def unfreeze(self) -> list[Slot]:
        """Make buckets for frozen parameters that require a gradient by now. Return the new slots."""
        unfrozen = [named for named in self._frozen if named[1].requires_grad]
        self._frozen = [named for named in self._frozen if not named[1].requires_grad]
        return self._add(unfrozen)

    def _add(self, parameters: Sequence[NamedParameter]) -> list[Slot]:
        """Append buckets for parameters. Existing buckets keep their parameters, state and owners."""
        if not parameters:
            return []
        names = {name for name, _ in parameters}
        buckets = build_buckets(
            parameters,
            self._policy,
            rank=self._comm.rank,
            world_size=self._comm.world_size,
            bucket_mb=self._bucket_mb,
            hierarchy=self._hierarchy,
            others=[named for named in self._all if named[0] not in names],
            indices={name: index for index, (name, _) in enumerate(self._all)},
        )
        for compressor, whitening, dtype, device in {
            (
                bucket.compressor,
                None if bucket.whitening is None else self._policy.whiten,
                bucket.description.dtype,
                bucket.flat.device,
            )
            for bucket in buckets
        }:
            rehearse(compressor, whitening, dtype, device, self._comm.world_size)
        for bucket in buckets:
            bucket.state.step = self.buckets[0].state.step if self.buckets else 0  # warmups and ramps follow the run
            if bucket.whitening is not None:
                bucket.whitening.restart()
        slots = [slot for bucket in buckets for slot in bucket.slots]
        self.buckets = [*self.buckets, *buckets]
        self.slots += slots
        self._is_ordered = False
        return slots

    def revert(self) -> None:
        """Revert changes of the compressors' state by gradients that were not stepped on."""
        for bucket in self.buckets:
            bucket.state.rollback()

    def restart_whitening(self) -> None:
        """Let whitening begin anew, as the optimizer's second moments are others now."""
        for bucket in self.buckets:
            if bucket.whitening is not None:
                bucket.whitening.restart()

    def note_uses(self, uses: Mapping[Slot, tuple[Use, int]], *, is_finite: bool) -> None:
        """Note which parameters any rank used in an exchange, and when their gradients came.

        After the first finite exchange buckets are sent in the order in which they became full in it.

        Args:
            uses: the use and the position of each parameter; the same on all ranks.
            is_finite: whether the gradients were finite.
        """
        for slot in self.slots:
            slot.num_unused = slot.num_unused + 1 if uses[slot][0] is Use.UNUSED else 0
        if is_finite and not self._is_ordered:
            self._is_ordered = True
            last = len(self._all)
            positions = {slot: last if use is Use.UNUSED else position for slot, (use, position) in uses.items()}
            self.buckets.sort(key=lambda bucket: max(positions[slot] for slot in bucket.slots))


def _hierarchy(comm: Communicator) -> Hierarchy:
    node, across = comm.group("node"), comm.group("across")
    return Hierarchy(node.rank, node.world_size, across.rank, across.world_size)
