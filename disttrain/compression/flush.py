"""Dense steps in the middle of a run, which also send the compressor's residuals, in equal parts."""

from __future__ import annotations

from typing import ClassVar

import torch

from disttrain.collectives import AllReduce
from disttrain.compression.algorithms.dense import Dense
from disttrain.compression.base import Bucket, NewState, Program, State
from disttrain.compression.two_stage import MEAN_RESIDUAL, own_chunk


class FlushResiduals(Dense):
    """Send gradients dense until ``state.dense_until``, and a share of the residuals with them.

    The k-th of n such steps sends 1 / (n - k + 1) of the residuals. The sum of all gradients is still what was sent
    plus the residuals, which are zero in the end, and no single step has to send a residual that has grown large.
    """

    sends_gradient_only: ClassVar[bool] = False
    needs_float32: ClassVar[bool] = True  # residuals are

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        num_steps = state.dense_until - state.step
        new: NewState = {}
        for name, residual in state.residuals.items():
            share = residual / num_steps
            grad.add_(share)
            new[name] = torch.sub(residual, share, out=state.scratch(name))
        if MEAN_RESIDUAL in state.tensors:  # a part of the mean, which no other rank has
            residual = state.tensors[MEAN_RESIDUAL].tensor
            share = residual / num_steps
            own_chunk(bucket).of(grad).add_(share, alpha=bucket.world_size)
            new[MEAN_RESIDUAL] = torch.sub(residual, share, out=state.scratch(MEAN_RESIDUAL))
        mean = yield AllReduce(grad, op="mean")
        return mean, new
