"""Squared norms of gradients before they are compressed: what a gradient's noise is measured by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch

from disttrain.collectives import AllGather, AllReduce, Result
from disttrain.comm.base import Communicator
from disttrain.comm.work import Work
from disttrain.reduction.bucket import GradientBucket
from disttrain.reduction.measurements.ledger import Ledger
from disttrain.reduction.measurements.meter import STATISTICS

_RARELY = 10
Every: TypeAlias = int | Literal["auto"]


class SquaredNorms(NamedTuple):
    """Of one step's gradients, in true units and before compression; equal on all ranks.

    Attributes:
        part: squared 2-norm of the gradient of a part of the batch: the mean over ranks of their own gradients'; in one
            process, that of its first backward pass.
        whole: squared 2-norm of the mean gradient over ranks.
    """

    part: float
    whole: float


class NormMeter:
    """Measures one step in every ``every`` committed ones, so that a step that was skipped leaves no trace.

    Dense means are looked at as they arrive. Where a gradient travels compressed, it is averaged once more, dense, in
    the steps that are measured: that is what ``every`` keeps rare. "auto" measures each step that sends all gradients
    dense, and one in ten of the others.
    """

    def __init__(self, every: Every, ledger: Ledger, comm: Communicator) -> None:
        self._every, self._ledger, self._comm = every, ledger, comm
        self._first_pass: torch.Tensor | None = None
        self._forget()

    def _forget(self) -> None:
        self._own: list[torch.Tensor] = []
        self._whole: list[torch.Tensor] = []
        self._pending: list[Work[Result]] = []

    def is_due(self, step: int, buckets: Sequence[GradientBucket]) -> bool:
        every = self._every
        if every == "auto":
            is_free = self._comm.world_size == 1 or all(_is_dense(bucket) for bucket in buckets)
            every = 1 if is_free else _RARELY
        return step % every == 0

    def measure_first_pass(self, buckets: Sequence[GradientBucket], scale: float) -> None:
        """In one process: note what the first of a step's backward passes gave, ``scale`` times the true gradients.

        Nothing with more processes, or if no norms are due.
        """
        if self._comm.world_size == 1 and self.is_due(buckets[0].state.step, buckets):
            grads = [slot.parameter.grad for bucket in buckets for slot in bucket.slots]
            self._first_pass = _square([grad.to_dense() for grad in grads if grad is not None]) / scale**2

    def leave(self, bucket: GradientBucket, flat: torch.Tensor) -> None:
        """Look at what a bucket sends."""
        self._own.append(_square([flat]))
        if self._comm.world_size > 1 and not _is_dense(bucket):
            self._pending.append(self._ledger.start(AllReduce(flat.clone(), "mean"), STATISTICS))

    def land(self, bucket: GradientBucket, mean: torch.Tensor) -> None:
        """Look at what has arrived, before it is committed."""
        if self._comm.world_size > 1 and _is_dense(bucket):
            self._whole.append(_square([mean]))

    def finish(self, is_whole: bool) -> SquaredNorms | None:
        """The step's norms, after all has arrived, equal on all ranks. None where ``is_whole`` is False.

        In one process None as well, without a first pass that was noted: a batch has no parts to compare then.
        """
        for work in self._pending:
            mean = work.wait()
            assert isinstance(mean, torch.Tensor)
            self._whole.append(_square([mean]))
        own, whole, first_pass = self._own, self._whole, self._first_pass
        self._forget()
        self._first_pass = None
        if not is_whole:
            return None
        if self._comm.world_size == 1:
            return None if first_pass is None else SquaredNorms(first_pass.item(), _sum(own))
        numbers = torch.tensor([_sum(own), _sum(whole)], dtype=torch.float64, device=self._comm.control_device)
        rows = self._ledger.start(AllGather(numbers, same_size=True), STATISTICS).wait()
        # In rank order, and the mean's norm as rank 0 has it: alike to the bit, whatever the engine and the machines.
        parts = [row.tolist() for row in rows]
        return SquaredNorms(sum(part for part, _ in parts) / len(parts), parts[0][1])


def _is_dense(bucket: GradientBucket) -> bool:
    """Whether the result is the mean of the gradients; dense steps that flush residuals add to it."""
    return bucket.present.sends_gradient_only


def _square(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The sum of squares, 0-d and float64, on the tensors' device."""
    return torch.stack([_one_square(tensor.reshape(-1)) for tensor in tensors]).sum()


def _one_square(flat: torch.Tensor) -> torch.Tensor:
    wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return torch.dot(wide, wide).double()


def _sum(numbers: list[torch.Tensor]) -> float:
    return sum(number.item() for number in numbers)
