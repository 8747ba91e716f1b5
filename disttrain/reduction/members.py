"""The parameters of a reducer and their buckets, which may become more while it lives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from disttrain.comm.base import Communicator
from disttrain.compression import Policy
from disttrain.compression.base import Hierarchy
from disttrain.reduction.bucket import GradientBucket, NamedParameter, Slot, build_buckets
from disttrain.reduction.exchange import rehearse


class Members:
    """Buckets of the parameters that require a gradient, and the names of those that do not yet.

    Attributes:
        buckets: in the order in which they leave.
        slots: of all of them.
        num_parameters: that are exchanged, or may come to be.
        num_elements: of the gradients that are exchanged.
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
        return len(self._all)

    @property
    def num_elements(self) -> int:
        return sum(bucket.description.numel for bucket in self.buckets)

    @property
    def keep_residuals(self) -> bool:
        """Whether compressors have state of a rank's own, in units of the gradient."""
        states = [bucket.state.tensors.values() for bucket in self.buckets]
        return any(kept.tensor.numel() and not kept.replicated for its in states for kept in its)

    @property
    def some_came_to_rest(self) -> bool:
        """Whether some parameter has just not been used: its place in the model may have been taken by another."""
        return any(slot.idle == 1 for slot in self.slots)

    def __contains__(self, parameter: torch.nn.Parameter) -> bool:
        """Whether its gradient is exchanged."""
        return any(slot.parameter is parameter for slot in self.slots)

    def extend(self, parameters: Sequence[NamedParameter], later: Sequence[NamedParameter]) -> list[Slot]:
        """Take in parameters, those that do not require a gradient yet as ``later``; the new slots."""
        self._all += [*parameters, *later]
        self._frozen += later
        return self._add(parameters)

    def unfreeze(self) -> list[Slot]:
        """Take in those that have come to require a gradient; the new slots."""
        thawed = [member for member in self._frozen if member[1].requires_grad]
        self._frozen = [member for member in self._frozen if not member[1].requires_grad]
        return self._add(thawed)

    def _add(self, parameters: Sequence[NamedParameter]) -> list[Slot]:
        """Make buckets for more parameters, behind the present ones.

        Those keep their members, their state and, in a hierarchical exchange, their owners.
        """
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
            others=[member for member in self._all if member[0] not in names],
            indices={name: index for index, (name, _) in enumerate(self._all)},
        )
        for kind in {(bucket.compressor, bucket.description.dtype, bucket.flat.device) for bucket in buckets}:
            rehearse(*kind, self._comm.world_size)
        for bucket in buckets:
            bucket.state.step = self.buckets[0].state.step if self.buckets else 0  # ramps and warm-ups are the run's
        slots = [slot for bucket in buckets for slot in bucket.slots]
        self.buckets = [*self.buckets, *buckets]
        self.slots += slots
        self._is_ordered = False
        return slots

    def revert(self) -> None:
        """Take back what gradients that were not stepped on have changed in compressors' state."""
        for bucket in self.buckets:
            bucket.state.rollback()

    def put_in_order(self, positions: Mapping[Slot, int]) -> None:
        """After the first exchange: let buckets leave from now on in the order in which they became full in it.

        Args:
            positions: when gradients came, of those that did; alike on all ranks.
        """
        if not self._is_ordered:
            self._is_ordered = True
            last = len(self._all)
            self.buckets.sort(key=lambda bucket: max(positions.get(slot, last) for slot in bucket.slots))


def _hierarchy(comm: Communicator) -> Hierarchy:
    node, across = comm.group("node"), comm.group("across")
    return Hierarchy(node.rank, node.world_size, across.rank, across.world_size)
