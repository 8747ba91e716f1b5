"""What compression does to each layer's gradient: what it still owes, and where the mean that it gives points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from disttrain.collectives import AllGather, AllReduce, Result
from disttrain.comm.base import Communicator
from disttrain.comm.work import Work
from disttrain.reduction.bucket import GradientBucket
from disttrain.reduction.measurements.ledger import Ledger
from disttrain.reduction.measurements.meter import STATISTICS


class Fidelity(NamedTuple):
    """Of one step, by the name of each parameter that travels compressed; equal on all ranks.

    Attributes:
        residual: norm of what the ranks have not sent yet, in norms of their gradients (root mean squares over ranks).
        cosine: between the mean that compression gave and the dense one; 0 if the former is all zeros, NaN if it holds
            an inf or NaN. Empty if it was not measured.
    """

    residual: dict[str, float]
    cosine: dict[str, float]


class FidelityMeter:
    """Measures after every so many committed steps.

    Args:
        every: steps between two looks at the residuals, a pass over memory and a few bytes a layer; None: none.
        cosine_every: steps between two comparisons, which exchange the gradients once more, dense; None: none.
    """

    def __init__(self, every: int | None, cosine_every: int | None, ledger: Ledger, comm: Communicator) -> None:
        self._every, self._cosine_every, self._ledger, self._comm = every, cosine_every, ledger, comm
        self._compares = False
        self._forget()

    def _forget(self) -> None:
        self._own: dict[GradientBucket, torch.Tensor] = {}
        self._dense: dict[GradientBucket, Work[Result]] = {}
        self._products: dict[GradientBucket, torch.Tensor] = {}

    def is_due(self, step: int, buckets: Sequence[GradientBucket]) -> bool:
        self._compares = self._cosine_every is not None and (step + 1) % self._cosine_every == 0
        return self._compares or (self._every is not None and (step + 1) % self._every == 0)

    def leave(self, bucket: GradientBucket, flat: torch.Tensor) -> None:
        if bucket.present.is_lossless:
            return
        self._own[bucket] = _squares(bucket.description.split(flat))
        if self._compares:
            self._dense[bucket] = self._ledger.start(AllReduce(flat.clone(), "mean"), STATISTICS)

    def land(self, bucket: GradientBucket, mean: torch.Tensor) -> None:
        if bucket not in self._dense:
            return
        dense = self._dense.pop(bucket).wait()
        assert isinstance(dense, torch.Tensor)
        ours, theirs = bucket.description.split(mean.view(-1)), bucket.description.split(dense)
        dots = [torch.dot(one.double(), other.double()) for one, other in zip(ours, theirs, strict=True)]
        self._products[bucket] = torch.stack([torch.stack(dots), _squares(ours), _squares(theirs)])

    def finish(self, is_whole: bool) -> Fidelity | None:
        """None where the step is not whole, or nothing travelled compressed."""
        own, products, pending = self._own, self._products, self._dense
        self._forget()
        for work in pending.values():  # of a step that is skipped
            work.wait()
        if not is_whole or not own:
            return None
        columns = []
        for bucket, squares in own.items():
            owed, owners = _owed(bucket)
            measured = products.get(bucket, torch.zeros(3, len(squares)))
            columns.append(torch.cat([torch.stack([squares.cpu(), owed, owners]), measured.cpu().double()]))
        table = torch.cat(columns, 1).to(self._comm.control_device)
        rows = self._ledger.start(AllGather(table, same_size=True), STATISTICS).wait()
        # In rank order, and the means' products as rank 0 has them: alike to the bit, whatever the engine and machines.
        total = torch.stack([row[:3].cpu() for row in rows]).sum(0)
        names = [name for bucket in own for name in bucket.description.names]
        residual = {
            name: math.sqrt(owed / max(1, owners)) / math.sqrt(square / len(rows))
            for name, (square, owed, owners) in zip(names, total.T.tolist(), strict=True)
            if square > 0
        }
        cosine = {
            name: 0.0 if ours == 0 else dot / (math.sqrt(ours) * math.sqrt(theirs))
            for name, (dot, ours, theirs) in zip(names, rows[0][3:].T.tolist(), strict=True)
            if theirs > 0
        }
        return Fidelity(residual, cosine)


def _squares(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared norms in float64, which the squares of float32 cannot leave."""
    return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in parts])


def _owed(bucket: GradientBucket) -> tuple[torch.Tensor, torch.Tensor]:
    """By parameter, the squared norm of what this rank owes, and 1 if it is one of those that owe."""
    names = bucket.description.names
    squares, owners = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for parameter, name, view, _ in bucket.state.slices(names, is_committed=False):
        if name in bucket.state.residuals and view.numel():
            squares[parameter] += float(torch.linalg.vector_norm(view, dtype=torch.float64)) ** 2
            owners[parameter] = 1.0
    return tuple(torch.tensor(list(numbers.values()), dtype=torch.float64) for numbers in (squares, owners))  # type: ignore[return-value]
