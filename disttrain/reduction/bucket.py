"""Buckets: parameters whose gradients travel together, in one flat buffer of which the gradients are views."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from disttrain.compression import Bucket, Compressor, Dense, Policy, hierarchical
from disttrain.compression.base import Hierarchy, NewState, Program, State
from disttrain.compression.flush import FlushResiduals
from disttrain.errors import UserError
from disttrain.kernels import for_device
from disttrain.reduction.meetings.status import Use

NamedParameter = tuple[str, torch.nn.Parameter]

_DENSE, _FLUSH = Dense(), FlushResiduals()
_IDLE_EXCHANGES = 3


@dataclass(eq=False)
class Slot:
    """One parameter's place in its bucket: ``view`` is its stretch of the flat buffer, shaped like the parameter.

    Attributes:
        index: among all parameters of the reducer's optimizer.
        is_local: ``parameter.grad`` holds something that the other ranks have not seen.
        has_mean: ``parameter.grad`` is a mean over ranks, as it arrived or as the user has changed it since.
        base: the mean that ``parameter.grad`` was when a local gradient was added to it.
        carried: what ``parameter.grad`` was when an exchange began, which is to be added to its result.
        finite: what is known of the numbers in ``view``; None if they have to be looked at.
        is_ready: a gradient has come since the exchange began.
        position: how many had come before it.
        is_used: a gradient was there when the bucket left.
        idle: exchanges in a row in which no rank used it.
    """

    name: str
    parameter: torch.nn.Parameter
    view: torch.Tensor
    bucket: GradientBucket
    index: int
    is_local: bool = False
    has_mean: bool = False
    base: torch.Tensor | None = None
    carried: torch.Tensor | None = None
    finite: bool | None = None
    is_ready: bool = False
    position: int = 0
    is_used: bool = False
    idle: int = 0

    @property
    def rests(self) -> bool:
        """Whether no rank has used it for a while, so that its bucket does not wait for it."""
        return self.idle >= _IDLE_EXCHANGES

    @property
    def has_local(self) -> bool:
        """Whether there is a gradient that the other ranks have not seen."""
        return self.parameter.grad is not None and (self.is_local or not self.has_mean)

    @property
    def use(self) -> Use:
        """What this rank has of the exchange under way, once the bucket has left."""
        if self.parameter.grad is not None:
            return Use.LATE
        return Use.USED if self.is_used else Use.UNUSED

    def open(self) -> None:
        """Begin an exchange: put a mean of earlier passes aside, so that only what is new travels."""
        self.is_ready = self.is_used = False
        base, self.base = self.base, None
        if self.parameter.grad is None:
            self.has_mean = self.is_local = False
        elif self.has_mean and not self.is_local:
            self._carry()
            self.parameter.grad = None
        elif base is not None:
            self.carried = base
            self.parameter.grad = self.parameter.grad - base

    def note_mean(self) -> None:
        """Remember the mean, as a local gradient is about to be added to it."""
        if self.has_mean and not self.is_local and self.base is None and self.parameter.grad is not None:
            self.base = self.parameter.grad.detach().clone()

    def _carry(self) -> None:
        """Set ``parameter.grad`` aside; what lies in the buffer is copied, as something else will be written there."""
        grad = self.parameter.grad
        assert grad is not None
        lies_in_buffer = not grad.is_sparse and _same_storage(grad, self.view)
        self.carried = grad.detach().clone() if lies_in_buffer else grad.detach()

    def take_in(self) -> None:
        """Move a gradient that autograd made elsewhere into the buffer; ``parameter.grad`` becomes the view of it."""
        grad = self.parameter.grad
        if grad is self.view:
            return
        if grad is None:
            self.view.zero_()
            self.finite = True
            return
        grad = grad.detach()
        if self.parameter.dtype != self.view.dtype:
            raise UserError(
                f"parameter {self.name!r} was {self.view.dtype} when it was given to the optimizer and is "
                f"{self.parameter.dtype} now: convert the model before the optimizer is made"
            )
        # A look at the numbers costs nothing while they are copied, and a pass over memory later.
        self.finite = for_device(grad.device).copy_finite(grad.to_dense() if grad.is_sparse else grad, self.view)
        self.parameter.grad = self.view

    def land(self, is_used: bool, keep: float = 1.0) -> None:
        """Show what has arrived in the buffer, if any rank had a gradient, and ``keep`` times what was there before."""
        carried, self.carried = self.carried, None
        if carried is not None and keep != 1.0:
            carried = carried * keep
        self.is_local = False
        if is_used:
            self.has_mean = True
            if carried is not None:
                self.view.add_(carried.to_dense() if carried.is_sparse else carried)
            self.parameter.grad = self.view
            return
        self.has_mean = carried is not None
        self.view.zero_() if carried is None else self.view.copy_(carried)
        self.parameter.grad = None if carried is None else self.view


@dataclass(eq=False)
class GradientBucket:
    """A flat buffer of gradients, the compressor that exchanges it from step ``dense_steps`` on, and its state.

    Attributes:
        version: of ``flat`` when the last means had arrived: another one shows that somebody has written there since.
        has_left: its exchange is under way.
    """

    description: Bucket
    compressor: Compressor
    state: State
    flat: torch.Tensor
    dense_steps: int = 0
    slots: list[Slot] = field(default_factory=list)
    version: int = 0
    has_left: bool = False

    @property
    def is_full(self) -> bool:
        """Whether every gradient that is expected has come."""
        return all(slot.is_ready or slot.rests for slot in self.slots)

    @property
    def is_changed(self) -> bool:
        """Whether the user has changed gradients since they arrived."""
        return self.flat._version != self.version or any(
            slot.has_mean and slot.parameter.grad is not slot.view for slot in self.slots
        )

    @property
    def holds_gradients(self) -> bool:
        """Whether all its gradients, and nothing else, are in ``flat``."""
        return all(slot.parameter.grad is (slot.view if slot.has_mean else None) for slot in self.slots)

    def open(self) -> None:
        """Begin an exchange. A mean that the user has dropped since takes its change of the state back."""
        self.has_left = False
        if dropped := self.dropped:
            self.state.rollback(dropped)
        for slot in self.slots:
            slot.open()

    @property
    def dropped(self) -> list[int]:
        """Of which parameters the user has removed the mean."""
        return [index for index, slot in enumerate(self.slots) if slot.has_mean and slot.parameter.grad is None]

    def settle(self) -> None:
        """The means have been stepped on."""
        if dropped := self.dropped:
            self.state.rollback(dropped)
        self.state.commit()

    def close(self) -> torch.Tensor:
        """Gather what is to be sent in the buffer, and hide it; whether all of it is finite, 0-d.

        Hidden, since nothing may write into what travels: a further gradient lies where autograd puts it.
        """
        for slot in self.slots:
            if slot.parameter.grad is slot.view and not slot.is_ready:
                slot.finite = None  # the user may have changed it
            slot.take_in()
            slot.is_used = slot.parameter.grad is not None
            slot.parameter.grad = None
        self.has_left = True
        known = [slot.finite for slot in self.slots]
        return all_finite(self.flat) if None in known else torch.tensor(all(known))

    def show(self) -> None:
        """Let ``parameter.grad`` be the mean, where there is one."""
        for slot in self.slots:
            slot.parameter.grad = slot.view if slot.has_mean else None

    def hide(self) -> None:
        for slot in self.slots:
            slot.parameter.grad = None

    @property
    def present(self) -> Compressor:
        """What exchanges it in this step."""
        step = self.state.step
        if step < self.dense_steps:
            return _DENSE
        return _FLUSH if step < self.state.dense_until and not self.compressor.is_lossless else self.compressor

    def exchange_dense(self, num_steps: int) -> None:
        """Exchange it dense in the next ``num_steps`` steps, and with them all that the compressor owes."""
        self.state.dense_until = max(self.state.dense_until, self.state.step + num_steps)

    def gradient(self, scale: float) -> torch.Tensor:
        """What the present compressor is to exchange: the buffer, of ``scale`` times the gradient, in true units.

        It is the buffer itself if dtypes agree.
        """
        flat = self.flat.to(self.description.dtype) if self.present.needs_float32 else self.flat
        return flat if scale == 1.0 else flat.mul_(1.0 / scale)

    def program(self, gradient: torch.Tensor) -> Program:
        """The present compressor's program over a gradient, which it may overwrite."""
        return hierarchical.reduce(self.present, gradient, self.description, self.state)

    def land(
        self, mean: torch.Tensor, new_state: NewState, used: Sequence[bool], scale: float = 1.0, keep: float = 1.0
    ) -> None:
        """Take over what a finished program gives: its state, and ``scale`` times its mean.

        It is added to ``keep`` times the gradients that were there when the exchange began.

        What some rank used of the parameters, in the order of ``slots``, gets its mean and its new state. Of the others
        nothing changes: what a compressor sent of their residuals stays owed.
        """
        resting = [index for index, is_used in enumerate(used) if not is_used]
        self.state.stage(new_state, resting)  # first, since a new residual may lie in the buffer
        if mean.data_ptr() != self.flat.data_ptr():
            self.flat.copy_(mean)
        if scale != 1.0:
            self.flat.mul_(scale)
        self._land(used, keep)

    def _land(self, used: Sequence[bool], keep: float = 1.0) -> None:
        for slot, is_used in zip(self.slots, used, strict=True):
            slot.land(is_used, keep)
        self.has_left = False
        self.version = self.flat._version

    def spoil(self, used: Sequence[bool]) -> None:
        """Let everybody see that the step is unsound: what would be a mean is NaN."""
        self.flat.fill_(math.nan)
        self._land(used)


def build_buckets(
    parameters: Sequence[NamedParameter],
    policy: Policy,
    *,
    rank: int,
    world_size: int,
    bucket_mb: float | None = None,
    hierarchy: Hierarchy | None = None,
    others: Sequence[NamedParameter] = (),
    indices: Mapping[str, int] | None = None,
) -> list[GradientBucket]:
    """Group parameters, in the order in which backward reaches them, into buckets of one compressor, dtype and device.

    Buckets are ordered by when their last gradient is due; the grouping depends on nothing but the parameters and the
    policy, so it is alike on all ranks. ``others`` come into no bucket, but rules may be for them: they are in
    buckets already, or will be. ``indices`` are what the slots' are to be, by name.

    Raises:
        UserError: a rule or a compressor of the policy does not suit the parameters.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in (*parameters, *others)}
    compressors = policy.assign(shapes)[: len(parameters)]
    open_groups: dict[tuple[Compressor, torch.dtype, torch.device], list[tuple[int, NamedParameter]]] = {}
    groups: list[tuple[Compressor, list[tuple[int, NamedParameter]]]] = []
    pairs = list(zip(parameters, compressors, strict=True))
    for due, ((name, parameter), chosen) in enumerate(reversed(pairs)):  # backward starts at the model's end
        key = (chosen, parameter.dtype, parameter.device)
        group = open_groups.setdefault(key, [])
        if not group:
            groups.append((chosen, group))
        group.append((due, (name, parameter)))
        capacity = (bucket_mb if bucket_mb is not None else chosen.bucket_mb) * 2**20
        if sum(member.numel() * member.itemsize for _, (_, member) in group) >= capacity:
            del open_groups[key]
    groups.sort(key=lambda item: item[1][-1][0])  # by the member that is due last
    buckets = [_build(chosen, [member for _, member in group], rank, world_size, hierarchy) for chosen, group in groups]
    indices = indices or {name: index for index, (name, _) in enumerate(parameters)}
    for bucket in buckets:
        bucket.dense_steps = policy.dense_steps
        for slot in bucket.slots:
            slot.index = indices[slot.name]
    return buckets


def _build(
    compressor: Compressor,
    members: Sequence[NamedParameter],
    rank: int,
    world_size: int,
    hierarchy: Hierarchy | None,
) -> GradientBucket:
    first = members[0][1]
    # Residuals and factors are kept in float32 at least.
    dtype = torch.promote_types(first.dtype, torch.float32) if compressor.needs_float32 else first.dtype
    description = Bucket(
        names=tuple(name for name, _ in members),
        shapes=tuple(tuple(parameter.shape) for _, parameter in members),
        dtype=dtype,
        device=first.device,
        rank=rank,
        world_size=world_size,
        hierarchy=hierarchy if compressor.hierarchical else None,
    )
    flat = torch.zeros(description.numel, dtype=first.dtype, device=first.device)
    bucket = GradientBucket(description, compressor, hierarchical.init_state(compressor, description), flat)
    for (name, parameter), part in zip(members, description.split(flat), strict=True):
        bucket.slots.append(Slot(name, parameter, _view_like(part, parameter), bucket, len(bucket.slots)))
    return bucket


def _view_like(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """``part`` in the parameter's shape and, where the parameter is dense with dimension 0 outermost, in its strides.

    So a channels_last weight gets a channels_last gradient, and dimension 0 of the buffer's matrix view is its own.
    """
    strides = parameter.stride()
    by_stride = sorted(range(parameter.dim()), key=lambda dim: strides[dim], reverse=True)
    expected = 1
    for dim in reversed(by_stride):
        if parameter.shape[dim] > 1 and strides[dim] != expected:
            return part.view(parameter.shape)
        expected *= parameter.shape[dim]
    rows = parameter.shape[0] if parameter.dim() else 1
    if rows > 1 and strides[0] != math.prod(parameter.shape[1:]):
        return part.view(parameter.shape)
    return part.as_strided(parameter.shape, strides)


def _same_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def all_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether there is no inf and no NaN, as a 0-d tensor on the same device."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.device.type == "cpu" and math.isfinite(tensor.sum(dtype=_wide(tensor.dtype)).item()):
        return torch.tensor(True)  # a finite sum proves it in one pass; an overflown one needs the second look
    return torch.isfinite(tensor).all()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
