"""The second moments of an optimizer, in whose units whitened gradients are compressed (``compression.whitening``).

The optimizer's step stays its own: it gets a mean gradient g, and updates its second moment v to ``decay v + share
g^2``. With v set beforehand, that is:

* after compressed steps, whose g says little about the square of the gradient: the larger of v at the last refresh and
  ``share g^2``. The latter counts where an entry exceeds 1 / sqrt(share) times its root mean square. There it bounds
  the step as it does without compression.
* in a refresh: what the last v and the square of g make up together. A refresh counts for all steps since the last one,
  but for no more than a share of ``_MAX_WEIGHT``, since one square says little about its mean.

In the warmup, whose steps are all refreshes, v is not set: these are the optimizer's own steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from disttrain.collectives import Broadcast
from disttrain.comm.base import Communicator
from disttrain.comm.coalescing import run_coalesced
from disttrain.compression.whitening import BucketWhitening
from disttrain.errors import UserError
from disttrain.kernels import for_device
from disttrain.optim.optimizers.lamb import LAMB
from disttrain.reduction.buckets.bucket import GradientBucket, Slot

Group = Mapping[str, Any]
Whitened = tuple[BucketWhitening, bool, int, Slot, Group]


_MAX_WEIGHT = 0.05


@dataclass(frozen=True)
class _Update:
    """How an optimizer updates and uses its second moment: ``v <- decay v + share g^2``, ``v / correction + eps``.

    Attributes:
        key: of v in the optimizer's state.
        decay, share: of a parameter group.
        correction: of a parameter group after a number of steps.
        weight: share of the last ``age`` of so many steps in v; of a parameter group, ``age`` and the number.
        coupled_decay: weight decay that is part of the gradient (L2), of a parameter group.
        refusal: a key of parameter groups that uses v in another way.
    """

    key: str
    decay: Callable[[Group], float]
    share: Callable[[Group], float]
    correction: Callable[[Group, float], float]
    weight: Callable[[Group, float, float], float]
    coupled_decay: Callable[[Group], float] = lambda group: float(group["weight_decay"])
    refusal: str = ""


def _beta2(group: Group) -> float:
    return float(group["betas"][1])


def _adam_correction(group: Group, steps: float) -> float:
    return 1 - _beta2(group) ** steps if group.get("bias_correction", True) else 1.0


_ADAM = _Update(
    "exp_avg_sq",
    decay=_beta2,
    share=lambda group: 1 - _beta2(group),
    correction=_adam_correction,
    weight=lambda group, age, steps: (1 - _beta2(group) ** age) / _adam_correction(group, steps),
    refusal="amsgrad",
)
_RMSPROP = _Update(
    "square_avg",
    decay=lambda group: float(group["alpha"]),
    share=lambda group: 1 - float(group["alpha"]),
    correction=lambda group, steps: 1.0,
    weight=lambda group, age, steps: 1 - float(group["alpha"]) ** age,
    refusal="centered",
)
_ADAGRAD = _Update(
    "sum",
    decay=lambda group: 1.0,
    share=lambda group: 1.0,
    correction=lambda group, steps: steps,  # the mean of the squares, not their sum, is comparable between steps
    weight=lambda group, age, steps: age / steps,
)
_DECOUPLED = replace(_ADAM, coupled_decay=lambda group: 0.0)
_UPDATES: dict[type[Optimizer], _Update] = {
    torch.optim.Adam: replace(
        _ADAM, coupled_decay=lambda group: 0.0 if group.get("decoupled_weight_decay") else float(group["weight_decay"])
    ),
    torch.optim.AdamW: _DECOUPLED,
    LAMB: _DECOUPLED,
    torch.optim.RMSprop: _RMSPROP,
    torch.optim.Adagrad: _ADAGRAD,
}


class SecondMoments:
    """Keeps the second moments of a torch optimizer and the scales of whitened buckets in step.

    Args:
        optimizer: the torch optimizer.
        are_used: whether some gradients are whitened. If not, any optimizer will do, and its steps are left alone.

    Raises:
        UserError: the optimizer has no second moment, or uses it in a way that is not supported.
    """

    def __init__(self, optimizer: Optimizer, *, are_used: bool) -> None:
        self._optimizer, self.are_used = optimizer, are_used
        if not are_used:
            return
        update = _UPDATES.get(type(optimizer))
        if update is None:
            raise UserError(
                "compressor.whiten divides gradients by the root of the optimizer's second moment, which "
                f"{type(optimizer).__name__} is not known to have: leave it out, or use one of "
                f"{', '.join(one.__name__ for one in _UPDATES)}"
            )
        self._update = update
        for group in optimizer.param_groups:
            self._check(group)

    def _check(self, group: Group) -> None:
        """Raise UserError if an option of the group changes what the second moment is."""
        if group.get(self._update.refusal):
            raise UserError(
                f"compressor.whiten does not support {type(self._optimizer).__name__} with {self._update.refusal}"
            )
        if self._update.decay(group) <= 0:
            raise UserError("compressor.whiten needs a second moment that lasts: its decay rate is 0")

    def step(self, buckets: Sequence[GradientBucket]) -> Any:
        """Step the optimizer on the gradients of these buckets."""
        if not self.are_used:
            return self._optimizer.step()
        whitened = list(self._whitened(buckets))
        self._prepare(whitened)
        result = self._optimizer.step()
        self._take_scales(whitened)
        return result

    @torch.no_grad()
    def _prepare(self, whitened: Sequence[Whitened]) -> None:
        """Set the second moments that the optimizer is about to update with the gradients of these parameters."""
        for whitening, is_refresh, index, slot, group in whitened:
            state = self._optimizer.state.get(slot.parameter, {})
            if self._update.key not in state:
                continue
            updated, eps = whitening.updated(index)
            steps = float(state["step"]) + 1
            age = steps - updated
            if updated < 0 or (is_refresh and age <= 1):
                continue
            self._check(group)
            decay, share = self._update.decay(group), self._update.share(group)
            whole = self._update.correction(group, steps)
            if is_refresh:
                weight = max(share / whole, min(self._update.weight(group, age, steps), _MAX_WEIGHT))
                whole, share = whole * (1 - weight), share - whole * weight
            for_device(slot.parameter.device).hold_second_moment(
                slot.like(whitening.part(index)),
                self._squared(slot, group),
                (eps, whole, share, decay),
                state[self._update.key],
            )

    @torch.no_grad()
    def _take_scales(self, whitened: Sequence[Whitened]) -> None:
        """Take the scales of these parameters from the second moments, if the step was a refresh."""
        for whitening, is_refresh, index, slot, group in whitened:
            if not is_refresh:
                continue
            state, eps = self._optimizer.state[slot.parameter], group.get("eps", 0.0)
            steps, scale = float(state["step"]), slot.like(whitening.part(index))
            mean_square = state[self._update.key] / self._update.correction(group, steps)
            total = mean_square.sum(dtype=torch.float64)
            change = self._squared(slot, group).square().sum(dtype=torch.float64) / total
            scale.copy_(mean_square.sqrt_()).add_(eps).clamp_(max=torch.finfo(scale.dtype).max)
            # A sum of zeros is no change, and neither is one whose square is not finite.
            whitening.note_update(index, steps, eps, float(change) if total > 0 else math.nan)

    def _squared(self, slot: Slot, group: Group) -> torch.Tensor:
        """Return what the optimizer squares: the gradient, with weight decay if that is coupled."""
        assert slot.parameter.grad is not None
        if not (decay := self._update.coupled_decay(group)):
            return slot.parameter.grad
        return slot.parameter.grad.add(slot.parameter, alpha=-decay if group.get("maximize") else decay)

    @staticmethod
    def share(buckets: Sequence[GradientBucket], comm: Communicator, root: int) -> None:
        """Copy the scales of rank ``root`` to all ranks. A collective."""
        tensors = [tensor for bucket in buckets if bucket.whitening is not None for tensor in bucket.whitening.tensors]
        run_coalesced(tensors, comm, lambda flat: Broadcast(flat, root))

    def _whitened(self, buckets: Sequence[GradientBucket]) -> Iterator[Whitened]:
        """Yield the whitened parameters that have a gradient.

        Yields:
            The bucket's whitening, whether the step is a refresh, the parameter's index in the bucket, its slot and its
            group.
        """
        groups = {parameter: group for group in self._optimizer.param_groups for parameter in group["params"]}
        for bucket in buckets:
            if bucket.whitening is not None:
                is_refresh = bucket.is_dense_step
                for index, slot in enumerate(bucket.slots):
                    if slot.parameter.grad is not None:
                        yield bucket.whitening, is_refresh, index, slot, groups[slot.parameter]
