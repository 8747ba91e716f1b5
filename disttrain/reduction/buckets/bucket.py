"""Buckets: parameters whose gradients are exchanged together, as views of one flat buffer.

Stages of a bucket in one exchange::

           open             close           launch            finalize           expose
    IDLE -------> GATHERING ------> CLOSED --------> IN_FLIGHT ---------> ARRIVED -------> EXPOSED
     ^              ^                                                        ^     hide      |  |
     |              |                                                        +---------------+  |
     |              +----- open: a further backward pass, or late gradients --------------------+
     +----- release, from any stage: the step has ended, or was dropped

``step.py`` has the phases of the whole step. While its phase is OPEN, every bucket is between GATHERING and ARRIVED;
while it is AVERAGED, every bucket is EXPOSED; while it is EMPTY, every bucket is IDLE. (A bucket that is added between
backward and step is IDLE until the next exchange opens.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch

from disttrain.compression import Bucket, Compressor, Dense, hierarchical
from disttrain.compression.base import NewState, Program, State
from disttrain.compression.flush import FlushResiduals
from disttrain.compression.whitening import BucketWhitening
from disttrain.errors import UserError
from disttrain.kernels import for_device
from disttrain.reduction.meetings.status import Use

NamedParameter = tuple[str, torch.nn.Parameter]

_DENSE, _FLUSH = Dense(), FlushResiduals()
_MAX_UNUSED = 3


class Stage(Enum):
    """Where a bucket is in its exchange, and so what may be in ``parameter.grad``."""

    IDLE = "idle"
    """No exchange: gradients of this rank only (``no_sync``), or what the user has put there."""
    GATHERING = "gathering"
    """Hooks copy gradients into ``flat``; ``parameter.grad`` becomes a view of it."""
    CLOSED = "closed"
    """``flat`` is complete and ``parameter.grad`` is None. A gradient that comes now is late: it stays where autograd
    puts it."""
    IN_FLIGHT = "in flight"
    """The compressor's program runs. As in CLOSED, so nothing can write into a buffer that is being sent."""
    ARRIVED = "arrived"
    """``flat`` is the mean over ranks; ``parameter.grad`` is None, or a late gradient."""
    EXPOSED = "exposed"
    """``parameter.grad`` is the mean, and the user's to change."""


CLOSED_STAGES = (Stage.CLOSED, Stage.IN_FLIGHT)
"""Stages in which a gradient that comes is late."""

_NEXT = {
    Stage.IDLE: (Stage.GATHERING,),
    Stage.GATHERING: (Stage.CLOSED,),
    Stage.CLOSED: (Stage.IN_FLIGHT,),
    Stage.IN_FLIGHT: (Stage.ARRIVED,),
    Stage.ARRIVED: (Stage.EXPOSED,),
    Stage.EXPOSED: (Stage.ARRIVED, Stage.GATHERING),
}


@dataclass(eq=False)
class Slot:
    """One parameter's place in its bucket: ``view`` is its part of the flat buffer, shaped like the parameter.

    Attributes:
        index: position among all parameters of the reducer.
        is_local: whether ``parameter.grad`` contains something that the other ranks have not seen.
        has_mean: whether ``parameter.grad`` contains a mean over ranks, as it arrived or as the user has changed it.
        earlier_mean: the mean of the step's earlier exchanges. Outside an exchange: a copy, made before a local
            gradient was added to the mean in ``parameter.grad``. During an exchange: what is added to its result.
        is_finite: whether ``view`` is finite; None if that is not known.
        is_pending: whether the bucket waits for this gradient in the open exchange.
        position: how many gradients of this exchange came before this one; None if it has not come.
        is_used: whether there was a gradient when the bucket was closed.
        num_unused: number of exchanges in a row in which no rank had a gradient.
    """

    name: str
    parameter: torch.nn.Parameter
    view: torch.Tensor
    bucket: GradientBucket
    index: int
    is_local: bool = False
    has_mean: bool = False
    earlier_mean: torch.Tensor | None = None
    is_finite: bool | None = None
    is_pending: bool = False
    position: int | None = None
    is_used: bool = False
    num_unused: int = 0

    @property
    def is_expected(self) -> bool:
        """Whether the bucket waits for this gradient; not if no rank has used the parameter for some exchanges."""
        return self.num_unused < _MAX_UNUSED

    @property
    def has_local(self) -> bool:
        """Whether there is a gradient that the other ranks have not seen."""
        return self.parameter.grad is not None and (self.is_local or not self.has_mean)

    @property
    def use(self) -> Use:
        """Whether this rank has a gradient in the open exchange, once the bucket is closed."""
        if self.parameter.grad is not None:
            return Use.LATE
        return Use.USED if self.is_used else Use.UNUSED

    def like(self, flat: torch.Tensor) -> torch.Tensor:
        """View a flat tensor of the parameter's elements as ``view`` views its part of the buffer."""
        return flat.as_strided(self.view.shape, self.view.stride())

    def open(self) -> None:
        """Start an exchange. Set the mean of earlier exchanges aside, so that it is not sent again."""
        self.position, self.is_used, self.is_pending = None, False, self.is_expected
        copied_mean, self.earlier_mean = self.earlier_mean, None
        grad = self.parameter.grad
        if grad is None:
            self.has_mean = self.is_local = False
        elif self.has_mean and not self.is_local:
            is_in_buffer = not grad.is_sparse and _shares_storage(grad, self.view)
            self.earlier_mean = grad.detach().clone() if is_in_buffer else grad.detach()
            self.parameter.grad = None
        elif copied_mean is not None:
            self.earlier_mean = copied_mean
            self.parameter.grad = grad - copied_mean

    def mark_ready(self, position: int) -> None:
        """Note that the gradient has come, as the one at ``position`` in this exchange."""
        self.position = position
        if self.is_pending:
            self.is_pending = False
            self.bucket.num_pending -= 1

    def save_mean(self) -> None:
        """Copy the mean, as a local gradient is about to be added to it."""
        if self.has_mean and not self.is_local and self.earlier_mean is None and self.parameter.grad is not None:
            self.earlier_mean = self.parameter.grad.detach().clone()

    def copy_in(self) -> None:
        """Copy the gradient into the buffer, unless it is there; ``parameter.grad`` becomes a view of the buffer.

        Raises:
            UserError: the parameter's dtype has changed.
        """
        grad = self.parameter.grad
        if grad is self.view:
            return
        if grad is None:
            self.view.zero_()
            self.is_finite = True
            return
        grad = grad.detach()
        if self.parameter.dtype != self.view.dtype:
            raise UserError(
                f"parameter {self.name!r} was {self.view.dtype} when the optimizer was made and is "
                f"{self.parameter.dtype} now: convert the model before making the optimizer"
            )
        # On a CPU the check is free while the numbers are copied, and costs a pass over memory later.
        self.is_finite = for_device(grad.device).copy_finite(grad.to_dense() if grad.is_sparse else grad, self.view)
        self.parameter.grad = self.view

    def finalize(self, is_used: bool, keep: float = 1.0) -> None:
        """Complete the mean in ``view``: add ``keep`` times the earlier mean.

        Args:
            is_used: whether any rank had a gradient. If not, the earlier mean stays as it is.
            keep: factor of the earlier mean.
        """
        earlier, self.earlier_mean = self.earlier_mean, None
        if earlier is not None and keep != 1.0:
            earlier = earlier * keep
        self.is_local = False
        self.has_mean = is_used or earlier is not None
        if not is_used:
            self.view.zero_() if earlier is None else self.view.copy_(earlier)
        elif earlier is not None:
            self.view.add_(earlier.to_dense() if earlier.is_sparse else earlier)

    def release(self) -> None:
        """End the step: what is in ``parameter.grad`` counts as the user's from now on."""
        self.has_mean, self.earlier_mean = False, None

    def discard(self) -> None:
        """Remove the gradient, and what has been exchanged of it."""
        self.parameter.grad = self.earlier_mean = None
        self.has_mean = self.is_local = False


@dataclass(eq=False)
class GradientBucket:
    """A flat buffer of gradients, its compressor (used from step ``dense_steps`` on) and the compressor's state.

    Attributes:
        dense: the compressor of dense steps.
        whitening: the units in which the compressor sees gradients, if not their own.
        stage: where it is in its exchange.
        num_pending: number of gradients that the bucket waits for in the open exchange.
        version: version of ``flat`` when the mean arrived; another one shows that the user has written there since.
    """

    description: Bucket
    compressor: Compressor
    state: State
    flat: torch.Tensor
    dense_steps: int = 0
    dense: Compressor = _DENSE
    whitening: BucketWhitening | None = None
    slots: list[Slot] = field(default_factory=list)
    version: int = 0
    stage: Stage = Stage.IDLE
    num_pending: int = 0

    def _advance(self, stage: Stage) -> None:
        assert stage in _NEXT[self.stage], f"{self.description.names[0]}: from {self.stage} to {stage}"
        self.stage = stage

    @property
    def is_full(self) -> bool:
        """Whether every expected gradient has come."""
        return self.num_pending == 0

    @property
    def is_closed(self) -> bool:
        """Whether the buffer is complete, and perhaps being sent."""
        return self.stage in CLOSED_STAGES

    @property
    def is_changed(self) -> bool:
        """Whether the user has changed gradients since the mean arrived."""
        return self.flat._version != self.version or any(
            slot.has_mean and slot.parameter.grad is not slot.view for slot in self.slots
        )

    @property
    def holds_gradients(self) -> bool:
        """Whether ``flat`` holds all gradients of the bucket and nothing else."""
        return all(slot.parameter.grad is (slot.view if slot.has_mean else None) for slot in self.slots)

    @property
    def dropped(self) -> list[int]:
        """Indices of the slots whose mean the user has removed."""
        return [index for index, slot in enumerate(self.slots) if slot.has_mean and slot.parameter.grad is None]

    # Stages, in order

    def open(self) -> None:
        """Start an exchange. Revert the state of parameters whose mean the user has removed."""
        self._advance(Stage.GATHERING)
        if dropped := self.dropped:
            self.state.rollback(dropped)
        for slot in self.slots:
            slot.open()
        self.num_pending = sum(slot.is_pending for slot in self.slots)

    def close(self) -> torch.Tensor:
        """Complete the buffer, with zeros where there is no gradient, and set ``parameter.grad`` to None.

        Returns:
            Whether all of it is finite, 0-d.
        """
        self._advance(Stage.CLOSED)
        for slot in self.slots:
            if slot.parameter.grad is slot.view and slot.position is None:
                slot.is_finite = None  # the user may have changed it
            slot.copy_in()
            slot.is_used = slot.parameter.grad is not None
            slot.parameter.grad = None
        known = [slot.is_finite for slot in self.slots]
        return all_finite(self.flat) if None in known else torch.tensor(all(known))

    def launch(self, gradient: torch.Tensor) -> Program:
        """Return the current compressor's program over ``gradient``, which it may overwrite."""
        self._advance(Stage.IN_FLIGHT)
        if self.whitening is not None and not self.is_dense_step:
            return self.whitening.reduce(self.current_compressor, gradient)
        return hierarchical.reduce(self.current_compressor, gradient, self.description, self.state)

    def finalize(
        self, mean: torch.Tensor, new_state: NewState, used: Sequence[bool], scale: float = 1.0, keep: float = 1.0
    ) -> None:
        """Load the result of a finished program: the compressor's new state, and the mean.

        The gradients become ``scale`` times the mean plus ``keep`` times the mean of the step's earlier exchanges.

        Args:
            mean: of the program.
            new_state: of the program.
            used: by slot, whether any rank had a gradient. Where none had, neither gradient nor state change: what the
                compressor sent of the residual stays in the residual.
            scale: factor of the mean.
            keep: factor of the earlier mean.
        """
        unused = [index for index, is_used in enumerate(used) if not is_used]
        if self.whitening is not None:
            self.whitening.note_used(used)
        self.state.stage(new_state, unused)  # first, since a new residual may be in the buffer
        if mean.data_ptr() != self.flat.data_ptr():
            self.flat.copy_(mean)
        if scale != 1.0:
            self.flat.mul_(scale)
        self._finalize_slots(used, keep)

    def finalize_nonfinite(self, used: Sequence[bool]) -> None:
        """Make the gradients NaN on all ranks, and leave the state: some rank's gradient was not finite."""
        self.flat.fill_(math.nan)
        self._finalize_slots(used)

    def _finalize_slots(self, used: Sequence[bool], keep: float = 1.0) -> None:
        self._advance(Stage.ARRIVED)
        for slot, is_used in zip(self.slots, used, strict=True):
            slot.finalize(is_used, keep)
        self.version = self.flat._version

    def expose(self) -> None:
        """Let ``parameter.grad`` be the mean where there is one, and None elsewhere."""
        self._advance(Stage.EXPOSED)
        for slot in self.slots:
            slot.parameter.grad = slot.view if slot.has_mean else None

    def hide(self) -> None:
        """Set ``parameter.grad`` to None until ``expose``."""
        self._advance(Stage.ARRIVED)
        for slot in self.slots:
            slot.parameter.grad = None

    def release(self, *, is_taken: bool, refresh_next: bool = False) -> None:
        """End the step. The compressor's state of the step counts if it ``is_taken``, and is reverted otherwise.

        ``refresh_next`` says whether the ranks have agreed on a refresh of whitened gradients in the next step.
        """
        self.stage = Stage.IDLE
        if self.whitening is not None:
            self.whitening.end_step(is_taken=is_taken, is_refresh=self.is_dense_step, refresh_next=refresh_next)
        if not is_taken:
            self.state.rollback()
        else:
            if dropped := self.dropped:
                self.state.rollback(dropped)
            self.state.commit()
        for slot in self.slots:
            slot.release()

    # The compressor

    @property
    def is_dense_step(self) -> bool:
        """Whether gradients alone are sent in this step: in the first ``dense_steps``, and in refreshes."""
        is_refresh = self.whitening is not None and self.whitening.is_refresh
        return is_refresh or self.state.step < self.dense_steps

    @property
    def current_compressor(self) -> Compressor:
        """The compressor of this step, which differs in dense steps and while residuals are flushed."""
        if self.compressor.is_lossless:
            return self.compressor
        if self.is_dense_step:
            return self.dense
        return _FLUSH if self.state.step < self.state.dense_until else self.compressor

    def exchange_dense(self, num_steps: int) -> None:
        """Exchange gradients dense in the next ``num_steps`` steps, and send the residual along with them."""
        self.state.dense_until = max(self.state.dense_until, self.state.step + num_steps)

    def gradient(self, scale: float) -> torch.Tensor:
        """Return the gradient in true units for the current compressor, from a buffer of ``scale`` times the gradient.

        It is the buffer itself if the dtypes agree.
        """
        flat = self.flat.to(self.description.dtype) if self.current_compressor.needs_float32 else self.flat
        return flat if scale == 1.0 else flat.mul_(1.0 / scale)


def _shares_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def all_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether the tensor has no inf and no NaN, 0-d, on the same device."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.device.type == "cpu" and math.isfinite(tensor.sum(dtype=_at_least_float32(tensor.dtype)).item()):
        return torch.tensor(True)  # a finite sum proves it in one pass; a sum that overflows does not disprove it
    return torch.isfinite(tensor).all()


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
