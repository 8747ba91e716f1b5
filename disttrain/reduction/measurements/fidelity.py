"""The error of compression by layer: the size of the residual, and the direction of the mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from disttrain.collectives import AllGather, AllReduce, Result
from disttrain.comm.work import Work
from disttrain.reduction.buckets.bucket import GradientBucket
from disttrain.reduction.exchange import Executor
from disttrain.reduction.measurements.meter import STATISTICS


class Fidelity(NamedTuple):
    """Measurements of one step, by the name of each compressed parameter; equal on all ranks.

    Attributes:
        residual: norm of the residual, divided by the norm of the gradient (root mean squares over ranks).
        cosine: cosine of the angle between the mean after compression and the dense mean; 0 if the former is zero, NaN
            if it is not finite. Empty if it was not measured.
    """

    residual: dict[str, float]
    cosine: dict[str, float]


class FidelityMeter:
    """Measures the error of compression in some steps, counted by the steps that were taken.

    Args:
        every: number of steps between two measurements of residuals, which cost a pass over memory and a few bytes a
            layer; None: never.
        cosine_every: number of steps between two measurements of cosines, which exchange the gradients once more,
            dense; None: never.
        executor: starts and counts the collectives.
    """

    def __init__(self, every: int | None, cosine_every: int | None, executor: Executor) -> None:
        self._every, self._cosine_every, self._executor, self._comm = every, cosine_every, executor, executor.comm
        self._measures_cosine = False
        self._reset()

    def _reset(self) -> None:
        self._own: dict[GradientBucket, torch.Tensor] = {}
        self._dense: dict[GradientBucket, Work[Result]] = {}
        self._products: dict[GradientBucket, torch.Tensor] = {}

    def is_due(self, step: int, buckets: Sequence[GradientBucket]) -> bool:
        self._measures_cosine = self._cosine_every is not None and (step + 1) % self._cosine_every == 0
        return self._measures_cosine or (self._every is not None and (step + 1) % self._every == 0)

    def before_exchange(self, bucket: GradientBucket, flat: torch.Tensor) -> None:
        if bucket.is_dense_step or bucket.current_compressor.is_lossless:
            return
        seen = flat if bucket.whitening is None else flat / bucket.whitening.scale  # the units of the residual
        self._own[bucket] = _squares(bucket.description.split(seen))
        if self._measures_cosine:
            self._dense[bucket] = self._executor.start(AllReduce(flat.clone(), "mean"), STATISTICS)

    def after_exchange(self, bucket: GradientBucket, mean: torch.Tensor) -> None:
        if bucket not in self._dense:
            return
        dense = self._dense.pop(bucket).wait()
        assert isinstance(dense, torch.Tensor)
        ours, theirs = bucket.description.split(mean.view(-1)), bucket.description.split(dense)
        dots = [torch.dot(one.double(), other.double()) for one, other in zip(ours, theirs, strict=True)]
        self._products[bucket] = torch.stack([torch.stack(dots), _squares(ours), _squares(theirs)])

    def result(self, is_complete: bool) -> Fidelity | None:
        """Return the step's measurements; None unless ``is_complete``, or if no gradient was compressed."""
        own, products, pending = self._own, self._products, self._dense
        self._reset()
        for work in pending.values():  # of a step whose gradients were not finite
            work.wait()
        if not is_complete or not own:
            return None
        columns = []
        for bucket, squares in own.items():
            residuals, owners = _residuals(bucket)
            measured = products.get(bucket, torch.zeros(3, len(squares)))
            columns.append(torch.cat([torch.stack([squares.cpu(), residuals, owners]), measured.cpu().double()]))
        table = torch.cat(columns, 1).to(self._comm.control_device)
        rows = self._executor.start(AllGather(table, same_size=True), STATISTICS).wait()
        # In rank order, and the means' products of rank 0: bit-identical on all ranks with any engine.
        total = torch.stack([row[:3].cpu() for row in rows]).sum(0)
        names = [name for bucket in own for name in bucket.description.names]
        relative = {
            name: math.sqrt(residual / max(1, owners)) / math.sqrt(square / len(rows))
            for name, (square, residual, owners) in zip(names, total.T.tolist(), strict=True)
            if square > 0
        }
        cosine = {
            name: 0.0 if ours == 0 else dot / (math.sqrt(ours) * math.sqrt(theirs))
            for name, (dot, ours, theirs) in zip(names, rows[0][3:].T.tolist(), strict=True)
            if theirs > 0
        }
        return Fidelity(relative, cosine)


def _squares(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the squared norms in float64, in which squares of float32 cannot overflow."""
    return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in parts])


def _residuals(bucket: GradientBucket) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, by parameter, the squared norm of this rank's residual, and 1 if it keeps one."""
    names = bucket.description.names
    squares, owners = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for parameter, name, view, _ in bucket.state.slices(names, is_committed=False):
        if name in bucket.state.residuals and view.numel():
            squares[parameter] += float(torch.linalg.vector_norm(view, dtype=torch.float64)) ** 2
            owners[parameter] = 1.0
    return tuple(torch.tensor(list(numbers.values()), dtype=torch.float64) for numbers in (squares, owners))  # type: ignore[return-value]
