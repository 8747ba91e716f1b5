"""Squared norms of gradients before compression, from which gradient noise is estimated."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch

from disttrain.collectives import AllGather, AllReduce, Result
from disttrain.comm.work import Work
from disttrain.reduction.buckets.bucket import GradientBucket
from disttrain.reduction.exchange import Executor
from disttrain.reduction.measurements.meter import STATISTICS

_COMPRESSED_EVERY = 10
Every: TypeAlias = int | Literal["auto"]


class SquaredNorms(NamedTuple):
    """Squared 2-norms of one step's gradients, in true units and before compression; equal on all ranks.

    Attributes:
        local: mean over ranks of the squared norm of their own gradient; in one process, that of the gradient of the
            first backward pass.
        averaged: squared norm of the mean gradient over ranks.
    """

    local: float
    averaged: float

    @property
    def part(self) -> float:
        """Deprecated: use ``local``."""
        warnings.warn("SquaredNorms.part is deprecated: use SquaredNorms.local", DeprecationWarning, stacklevel=2)
        return self.local

    @property
    def whole(self) -> float:
        """Deprecated: use ``averaged``."""
        warnings.warn("SquaredNorms.whole is deprecated: use SquaredNorms.averaged", DeprecationWarning, stacklevel=2)
        return self.averaged


class NormMeter:
    """Measures squared norms in some steps, counted by the steps that were taken.

    Dense means are measured as they arrive. Compressed gradients are averaged once more, dense, in the steps that are
    measured, so measure them rarely.

    Args:
        every: number of steps between two measurements; "auto" measures each step that sends all gradients dense, and
            one in ten of the others.
        executor: starts and counts the collectives.
    """

    def __init__(self, every: Every, executor: Executor) -> None:
        self._every, self._executor, self._comm = every, executor, executor.comm
        self._first_pass: torch.Tensor | None = None
        self._reset()

    def _reset(self) -> None:
        self._own: list[torch.Tensor] = []
        self._averaged: list[torch.Tensor] = []
        self._pending: list[Work[Result]] = []

    def is_due(self, step: int, buckets: Sequence[GradientBucket]) -> bool:
        every = self._every
        if every == "auto":
            is_free = self._comm.world_size == 1 or all(_is_dense(bucket) for bucket in buckets)
            every = 1 if is_free else _COMPRESSED_EVERY
        return step % every == 0

    def measure_first_pass(self, buckets: Sequence[GradientBucket], scale: float) -> None:
        """In one process, measure the gradients of the first backward pass, ``scale`` times the true ones.

        Does nothing with more processes, or if no norms are due.
        """
        if self._comm.world_size == 1 and self.is_due(buckets[0].state.step, buckets):
            grads = [slot.parameter.grad for bucket in buckets for slot in bucket.slots]
            self._first_pass = _square([grad.to_dense() for grad in grads if grad is not None]) / scale**2

    def before_exchange(self, bucket: GradientBucket, flat: torch.Tensor) -> None:
        """Measure this rank's own gradient. If it is compressed, start averaging it."""
        self._own.append(_square([flat]))
        if self._comm.world_size > 1 and not _is_dense(bucket):
            self._pending.append(self._executor.start(AllReduce(flat.clone(), "mean"), STATISTICS))

    def after_exchange(self, bucket: GradientBucket, mean: torch.Tensor) -> None:
        """Measure the mean of a dense bucket."""
        if self._comm.world_size > 1 and _is_dense(bucket):
            self._averaged.append(_square([mean]))

    def result(self, is_complete: bool) -> SquaredNorms | None:
        """Return the step's norms, equal on all ranks; None unless ``is_complete``.

        In one process also None without ``measure_first_pass``, as there is no part of the batch to compare.
        """
        for work in self._pending:
            mean = work.wait()
            assert isinstance(mean, torch.Tensor)
            self._averaged.append(_square([mean]))
        own, averaged, first_pass = self._own, self._averaged, self._first_pass
        self._reset()
        self._first_pass = None
        if not is_complete:
            return None
        if self._comm.world_size == 1:
            return None if first_pass is None else SquaredNorms(first_pass.item(), _sum(own))
        numbers = torch.tensor([_sum(own), _sum(averaged)], dtype=torch.float64, device=self._comm.control_device)
        rows = self._executor.start(AllGather(numbers, same_size=True), STATISTICS).wait()
        # In rank order, and the mean's norm of rank 0: bit-identical on all ranks with any engine.
        norms = [row.tolist() for row in rows]
        return SquaredNorms(sum(local for local, _ in norms) / len(norms), norms[0][1])


def _is_dense(bucket: GradientBucket) -> bool:
    """Whether the mean is that of the gradients alone; dense steps that flush residuals add to it."""
    return bucket.current_compressor.sends_gradient_only


def _square(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of squares, 0-d and float64, on the tensors' device."""
    return torch.stack([_one_square(tensor.reshape(-1)) for tensor in tensors]).sum()


def _one_square(flat: torch.Tensor) -> torch.Tensor:
    wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return torch.dot(wide, wide).double()


def _sum(numbers: list[torch.Tensor]) -> float:
    return sum(number.item() for number in numbers)
