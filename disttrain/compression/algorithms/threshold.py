"""Threshold: send what exceeds a threshold that adapts to a target density (Strom 2015; Dryden et al. 2016)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field

from disttrain.compression.algorithms.sparse import SparseCodec, num_kept, room_for
from disttrain.compression.base import Bucket, Program, State
from disttrain.compression.codec import Payload
from disttrain.kernels import Feedback, for_device

_DAMPING = 0.7  # less than a full step, since tails lighter than exponential react more strongly
_LOST = 4.0  # if this many times too few or too many entries are found, the threshold is estimated again


class Threshold(SparseCodec):
    """Send the entries p with |p| >= t, as values and int32 indices, in one pass without any selection.

    Every rank adapts its own t to send ``ratio`` of the entries: after each step t <- t (1 + a ln(sent / target)), with
    a = 0.7 / ln(1 / ratio), the slope of an exponential tail, damped. The first t is estimated from a sample, and so is
    the next one if four times too few or too many entries were found.

    Not a contraction while t is far too high: keep error feedback on. Differs from Strom's, where t is fixed, and in
    the payload, whose size does not depend on values: it has room for 1.25 k entries and is padded with zeros. Entries
    that do not fit stay in the residual. Wire: 1.25 k (4 + value size) bytes a rank, all-gathered.
    """

    name = "threshold"
    by_element: ClassVar[bool] = False  # the threshold is that of the whole bucket

    ratio: float = Field(default=0.01, gt=0, le=1, description="target share of the entries sent each step")

    def init_state(self, bucket: Bucket) -> State:
        state = super().init_state(bucket)
        # One for each parameter, all equal, so that they can be loaded into other buckets. 0 means unknown.
        thresholds = torch.zeros(len(bucket.names), dtype=bucket.dtype, device=bucket.device)
        state.add("threshold", thresholds, [1] * len(bucket.names), replicated=False)
        return state

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        mean, new_state = yield from super().reduce(grad, bucket, state)
        return mean, {**new_state, "threshold": state.scratch("threshold")}

    def encode_with_residual(
        self, grad: torch.Tensor, feedback: Feedback | None, bucket: Bucket, state: State
    ) -> Payload:
        assert grad.numel() < 2**31, "indices are int32"
        kernels = for_device(grad.device)
        k = num_kept(self.ratio, grad.numel())
        threshold = float(state.threshold.mean())
        if not threshold > 0:
            threshold = kernels.estimate_threshold(grad, feedback, k / grad.numel())
        values, indices, count = kernels.take_above(grad, feedback, threshold, room_for(k, grad.numel()))
        state.scratch("threshold").fill_(self._adapted(threshold, count / k))
        return {"values": values, "indices": indices}

    def _adapted(self, threshold: float, achieved: float) -> float:
        if not 1 / _LOST <= achieved <= _LOST:
            return 0.0
        slope = _DAMPING / max(1.0, math.log(1 / self.ratio))
        return threshold * max(0.5, 1 + slope * math.log(achieved))
