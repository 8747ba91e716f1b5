"""Exponential moving average of the weights: smoother than the last weights, and often better on held-out data.

After each step ``a <- d a + (1 - d) w``, so the weights of k steps ago count with a factor of ``(1 - d) d^k``
(Polyak and Juditsky 1992; the exponential form is from Tarvainen and Valpola 2017, arXiv:1703.01780).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch.optim.swa_utils import get_ema_multi_avg_fn

from disttrain.errors import UserError
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.optim.replicas.synchronization import average_tensors
from disttrain.validation import Section


class Average(Section):
    """The config's ``average:`` section."""

    decay: float = Field(default=0.999, gt=0, lt=1, description="fraction of the average that each step keeps")
    warmup: bool = Field(
        default=True,
        description="limit the decay at the n-th step to (1 + n) / (10 + n), so that early weights are soon forgotten",
    )
    after_steps: int = Field(
        default=0, ge=0, description="steps before averaging starts; until then the average is not used"
    )

    def build(self, optimizer: DistributedOptimizer) -> WeightAverage:
        return WeightAverage(optimizer, self.decay, warmup=self.warmup, after_steps=self.after_steps)


class BaseAverage:
    """What a training loop does with an average. By default nothing: the model keeps its own weights."""

    num_steps = 0

    def update(self) -> None:
        """Update the average after an optimizer step."""

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model has the averaged weights and buffers."""
        return contextlib.nullcontext()

    def copy_to_model(self) -> None:
        """Copy the averaged weights and buffers into the model."""

    def synchronize_buffers(self) -> None:
        """Average the averaged buffers over all ranks. Collective."""

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the averaged buffers by name; they differ by rank until they are synchronized."""
        return {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the averaged tensors by the model's own names. Save ``num_steps`` beside them."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], num_steps: int) -> None:
        """Load the tensors that ``state_dict`` returned, and ``num_steps``."""


class NoAverage(BaseAverage):
    """Stands for the average in a run that has none."""


class WeightAverage(BaseAverage):
    """Averages the weights of a model that a ``DistributedOptimizer`` trains::

        average = disttrain.WeightAverage(optimizer, decay=0.999)
        ...
        optimizer.step()
        average.update()                 # does nothing after a skipped step
        ...
        with average.applied():          # evaluate or save the averaged weights
            evaluate(model)

    Every rank keeps the average. The weights are bit-identical on all ranks, so the averages are too. Floating-point
    buffers (BatchNorm statistics) are averaged with the same decay. They differ by rank, because each rank has seen
    other samples: call ``synchronize_buffers`` before evaluation and before saving. Other buffers are not averaged.

    Args:
        optimizer: The optimizer of the model.
        decay: Fraction of the average that each step keeps, between 0 and 1. An average looks back about
            1 / (1 - decay) steps.
        warmup: Limit the decay at the n-th step to (1 + n) / (10 + n).
        after_steps: Steps before averaging starts. The first average is a copy of the weights.

    Attributes:
        num_steps: Optimizer steps so far, without skipped ones.
        tensors: The averages by name; empty before the first one.

    Raises:
        UserError: A value is out of bounds.
    """

    def __init__(
        self, optimizer: DistributedOptimizer, decay: float = 0.999, *, warmup: bool = True, after_steps: int = 0
    ) -> None:
        if not 0 < decay < 1:
            raise UserError(f"decay={decay} must be above 0 and below 1")
        if after_steps < 0:
            raise UserError(f"after_steps={after_steps} must be at least 0")
        self.decay, self.warmup, self.after_steps = decay, warmup, after_steps
        self.num_steps = 0
        self._optimizer, self._skipped_steps = optimizer, optimizer.skipped_steps
        model = optimizer.model
        saved = model.state_dict().keys()
        self._parameters = dict(model.named_parameters())
        self._buffers = [name for name, tensor in model.named_buffers() if name in saved and tensor.is_floating_point()]
        self.tensors: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimizer step; do nothing if the step was skipped."""
        skipped_before, self._skipped_steps = self._skipped_steps, self._optimizer.skipped_steps
        if skipped_before != self._skipped_steps:
            return
        self.num_steps += 1
        num_updates = self.num_steps - self.after_steps
        if num_updates <= 0:
            return
        live = self._live()
        if not self.tensors:
            self.tensors = {name: tensor.detach().clone() for name, tensor in live.items()}
            return
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates)) if self.warmup else self.decay
        lerp = get_ema_multi_avg_fn(decay)
        groups: defaultdict[tuple[torch.dtype, torch.device], list[str]] = defaultdict(list)
        for name, tensor in live.items():
            groups[tensor.dtype, tensor.device].append(name)
        for names in groups.values():
            lerp([self.tensors[name] for name in names], [live[name].detach() for name in names], num_updates)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights and buffers inside the context, and its own back afterwards, bit for bit.

        Example::

            with average.applied():
                evaluate(model)
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        live = self._live()
        for name, averaged in self.tensors.items():
            own = live[name].detach().clone()
            live[name].copy_(averaged)
            averaged.copy_(own)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        live = self._live()
        for name, averaged in self.tensors.items():
            live[name].copy_(averaged)

    def synchronize_buffers(self) -> None:
        """Average the averaged buffers over all ranks: before evaluation and before saving. Collective."""
        average_tensors(self.buffers().values(), self._optimizer.comm)

    def buffers(self) -> dict[str, torch.Tensor]:
        return {name: self.tensors[name] for name in self._buffers if name in self.tensors}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.tensors)

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], num_steps: int) -> None:
        """Load the tensors that ``state_dict`` returned, and ``num_steps``.

        Raises:
            UserError: The average belongs to another model.
        """
        live = self._live()
        if tensors and (odd := sorted(tensors.keys() ^ live.keys())):
            where = "only in the saved average" if odd[0] in tensors else "only in the model"
            raise UserError(f"the saved average belongs to another model: {odd[0]!r} is {where}")
        for name, tensor in tensors.items():
            if tensor.shape != live[name].shape:
                raise UserError(
                    f"the saved average belongs to another model: {name!r} has shape {list(tensor.shape)} in the "
                    f"average and {list(live[name].shape)} in the model"
                )
        self.tensors = {name: torch.empty_like(live[name]).copy_(tensor) for name, tensor in tensors.items()}
        self.num_steps, self._skipped_steps = num_steps, self._optimizer.skipped_steps

    def _live(self) -> dict[str, torch.Tensor]:
        # Buffers are looked up each time, because a module may replace them.
        buffers = dict(self._optimizer.model.named_buffers()) if self._buffers else {}
        return {**self._parameters, **{name: buffers[name] for name in self._buffers}}
