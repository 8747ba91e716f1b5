"""Dense steps in the middle of a run: what compression still owes goes along, in equal parts."""

from __future__ import annotations

from typing import ClassVar

import torch

from disttrain.collectives import AllReduce
from disttrain.compression.algorithms.dense import Dense
from disttrain.compression.base import Bucket, NewState, Program, State
from disttrain.compression.codec import chunk_of

OWED = ("residual", "velocity")
"""How compressors call what is as large as the gradient and still to be sent."""
_OWED_BY_SERVER = "server_residual"


class FlushResiduals(Dense):
    """Send gradients dense until ``state.dense_until``, and with the k-th of n such steps a part of 1/(n - k + 1).

    So what was sent and what is still owed remain the sum of all gradients, nothing is owed in the end, and no step has
    to bear all of a residual that may have grown beyond measure.
    """

    needs_float32: ClassVar[bool] = True  # residuals are

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        num_steps = state.dense_until - state.step
        new: NewState = {}
        for name in (*OWED, _OWED_BY_SERVER):
            if name not in state.tensors:
                continue
            owed = state.tensors[name].tensor
            part = owed / num_steps
            if name == _OWED_BY_SERVER:  # of the mean, and no other rank's
                start, end = chunk_of(bucket)
                grad[start:end].add_(part, alpha=bucket.world_size)
            else:
                grad.add_(part)
            new[name] = torch.sub(owed, part, out=state.scratch(name))
        mean = yield AllReduce(grad, op="mean")
        return mean, new
