"""Buckets: parameters whose gradients travel together, in one flat buffer of which the gradients are views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from disttrain.compression import Bucket, Compressor, Dense, Policy, hierarchical
from disttrain.compression.base import Hierarchy, NewState, Program, State
from disttrain.compression.repay import Repay
from disttrain.kernels import for_device

NamedParameter = tuple[str, torch.nn.Parameter]

_DENSE, _REPAY = Dense(), Repay()


@dataclass(eq=False)
class Slot:
    """One parameter's place in its bucket: ``view`` is its stretch of the flat buffer, shaped like the parameter.

    Attributes:
        ready: a gradient has come in the present backward pass.
        used: it had a gradient when its bucket left; once the ranks have agreed, on any of them.
        finite: what is known of the numbers in ``view``; None if they have to be looked at.
    """

    name: str
    parameter: torch.nn.Parameter
    view: torch.Tensor
    bucket: GradientBucket
    ready: bool = False
    used: bool = False
    finite: bool | None = None

    def take_in(self) -> None:
        """Move a gradient that autograd made elsewhere into the buffer; ``parameter.grad`` becomes the view of it."""
        grad = self.parameter.grad
        if grad is self.view:
            return
        if grad is None:
            self.view.zero_()
            self.finite = True
            return
        # A look at the numbers costs nothing while they are copied, and a pass over memory later.
        self.finite = for_device(grad.device).copy_finite(grad.to_dense() if grad.is_sparse else grad, self.view)
        self.parameter.grad = self.view


@dataclass(eq=False)
class GradientBucket:
    """A flat buffer of gradients, the compressor that exchanges it from step ``dense_steps`` on, and its state."""

    description: Bucket
    compressor: Compressor
    state: State
    flat: torch.Tensor
    dense_steps: int = 0
    slots: list[Slot] = field(default_factory=list)
    num_ready: int = 0
    has_left: bool = False

    @property
    def is_full(self) -> bool:
        return self.num_ready == len(self.slots)

    @property
    def has_gradient(self) -> bool:
        return any(slot.parameter.grad is not None for slot in self.slots)

    def show_gradients(self) -> None:
        """Let ``parameter.grad`` be the view of the buffer, for those parameters that some rank used."""
        for slot in self.slots:
            slot.parameter.grad = slot.view if slot.used else None

    def hide_gradients(self) -> None:
        for slot in self.slots:
            slot.parameter.grad = None

    @property
    def present(self) -> Compressor:
        """What exchanges it in this step."""
        step = self.state.step
        if step < self.dense_steps:
            return _DENSE
        return _REPAY if step < self.state.dense_until and not isinstance(self.compressor, Dense) else self.compressor

    def be_dense(self, num_steps: int) -> None:
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

    def land(self, mean: torch.Tensor, new_state: NewState) -> None:
        """Commit a finished program: its state, and its mean to the buffer."""
        self.state.commit(new_state)  # first, since a new residual may lie in the buffer
        if mean.data_ptr() != self.flat.data_ptr():
            self.flat.copy_(mean)


def build_buckets(
    parameters: Sequence[NamedParameter],
    policy: Policy,
    *,
    rank: int,
    world_size: int,
    bucket_mb: float | None = None,
    hierarchy: Hierarchy | None = None,
    others: Sequence[NamedParameter] = (),
) -> list[GradientBucket]:
    """Group parameters, in the order in which backward reaches them, into buckets of one compressor, dtype and device.

    Buckets are ordered by when their last gradient is due; the grouping depends on nothing but the parameters and the
    policy, so it is alike on all ranks. ``others`` come into no bucket, but rules may be for them: they are in
    buckets already, or will be.

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
    for bucket in buckets:
        bucket.dense_steps = policy.dense_steps
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
        bucket.slots.append(Slot(name, parameter, _view_like(part, parameter), bucket))
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
