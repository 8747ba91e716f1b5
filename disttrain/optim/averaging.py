"""An exponential moving average of the weights: smoother than the last ones, and often better on held-out data.

After each step ``a <- d a + (1 - d) w``, which weighs the weights of k steps ago by ``(1 - d) d^k``
(Polyak and Juditsky 1992; the exponential form is that of Tarvainen and Valpola 2017, arXiv:1703.01780).
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

    decay: float = Field(default=0.999, gt=0, lt=1, description="what is kept of the average at each step")
    warmup: bool = Field(
        default=True, description="no more than (1 + n) / (10 + n) at the n-th step, to forget the first weights soon"
    )
    after_steps: int = Field(default=0, ge=0, description="steps before the average begins; until then it is not used")

    def build(self, optimizer: DistributedOptimizer) -> WeightAverage:
        return WeightAverage(optimizer, self.decay, warmup=self.warmup, after_steps=self.after_steps)


class WeightAverage:
    """Follows the weights of a model that a ``DistributedOptimizer`` trains::

        average = disttrain.WeightAverage(optimizer, decay=0.999)
        ...
        optimizer.step()
        average.update()                 # does nothing after a step that was skipped
        ...
        with average.applied():          # evaluate, or save, the averaged weights
            evaluate(model)

    All ranks keep it, and as their weights are bit-identical, so are the averages. Floating-point buffers (BatchNorm
    statistics) are averaged with the same decay; as each rank has statistics of its own samples,
    ``synchronize_buffers`` takes their mean over ranks, before evaluation and before saving. Other buffers stay the
    model's.

    Args:
        optimizer: of the model to follow.
        decay: what is kept of the average at each step, between 0 and 1. An average looks back about 1 / (1 - decay)
            steps.
        warmup: keep no more than (1 + n) / (10 + n) at the n-th step.
        after_steps: steps before the average begins. Its first value is a copy of the weights.

    Attributes:
        num_steps: steps that counted so far.
        tensors: the averages by name; empty before the first.

    Raises:
        UserError: a value out of bounds.
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
        self._optimizer, self._skipped = optimizer, optimizer.skipped_steps
        model = optimizer.model
        saved = model.state_dict().keys()
        self._parameters = dict(model.named_parameters())
        self._buffers = [name for name, tensor in model.named_buffers() if name in saved and tensor.is_floating_point()]
        self.tensors: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step; nothing if the optimizer skipped it."""
        skipped, self._skipped = self._skipped, self._optimizer.skipped_steps
        if skipped != self._skipped:
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
        """Inside, the model has the averaged weights and buffers; afterwards its own again, bit for bit."""
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
        """Leave the averaged weights and buffers in the model for good."""
        live = self._live()
        for name, averaged in self.tensors.items():
            live[name].copy_(averaged)

    def synchronize_buffers(self) -> None:
        """Take the mean over ranks of the averaged buffers: before evaluation and before saving, on all ranks."""
        average_tensors(self.buffers().values(), self._optimizer.comm)

    def buffers(self) -> dict[str, torch.Tensor]:
        """The averaged buffers; those of another rank may be others."""
        return {name: self.tensors[name] for name in self._buffers if name in self.tensors}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged tensors by the names of the model's own; ``num_steps`` is to be saved beside them."""
        return dict(self.tensors)

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], num_steps: int) -> None:
        """Take over what ``state_dict`` gave, and ``num_steps``.

        Raises:
            UserError: it is the average of another model.
        """
        live = self._live()
        if tensors and (odd := sorted(tensors.keys() ^ live.keys())):
            raise UserError(f"the saved average is of another model: {odd[0]!r} is only in one of the two")
        for name, tensor in tensors.items():
            if tensor.shape != live[name].shape:
                raise UserError(f"the saved average of {name!r} has shape {list(tensor.shape)}: the model has changed")
        self.tensors = {name: torch.empty_like(live[name]).copy_(tensor) for name, tensor in tensors.items()}
        self.num_steps, self._skipped = num_steps, self._optimizer.skipped_steps

    def _live(self) -> dict[str, torch.Tensor]:
        buffers = dict(self._optimizer.model.named_buffers()) if self._buffers else {}  # a module may make new ones
        return {**self._parameters, **{name: buffers[name] for name in self._buffers}}


class NoAverage:
    """The twin of ``WeightAverage`` where nothing is averaged: the model is evaluated with its own weights."""

    num_steps = 0

    def update(self) -> None: ...
    def copy_to_model(self) -> None: ...
    def synchronize_buffers(self) -> None: ...
    def applied(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def buffers(self) -> dict[str, torch.Tensor]:
        return {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], num_steps: int) -> None: ...
