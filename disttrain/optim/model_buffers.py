"""Buffers that differ by rank, such as BatchNorm statistics, where checkpoints and evaluation want one for all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from disttrain.optim.averaging import NoAverage, WeightAverage
from disttrain.optim.distributed import DistributedOptimizer


class ModelBuffers:
    """Those of the model, and the averaged ones of a ``WeightAverage``."""

    def __init__(self, optimizer: DistributedOptimizer, average: WeightAverage | NoAverage) -> None:
        self._optimizer, self._average = optimizer, average

    def synchronize(self) -> None:
        """Leave every rank with the means over ranks. A collective."""
        self._optimizer.synchronize_buffers()
        self._average.synchronize_buffers()

    @contextlib.contextmanager
    def alike(self) -> Iterator[dict[str, torch.Tensor]]:
        """Inside, they are the means over ranks, afterwards this rank's own again: those are yielded. A collective.

        So a checkpoint more or less, because a run was interrupted, changes nothing.
        """
        own = {name: tensor.detach().clone() for name, tensor in self.own().items()}
        self.synchronize()
        try:
            yield own
        finally:
            self.load(own)

    @torch.no_grad()
    def load(self, own: Mapping[str, torch.Tensor]) -> None:
        """Take over what ``alike`` yielded.

        Raises:
            KeyError, RuntimeError: they are of another model.
        """
        live = self.own()
        for name, tensor in own.items():
            live[name].copy_(tensor)
        self._optimizer.keep_buffers()

    def own(self) -> dict[str, torch.Tensor]:
        """This rank's, live."""
        model = {f"model/{name}": tensor for name, tensor in self._optimizer.model.named_buffers()}
        return model | {f"average/{name}": tensor for name, tensor in self._average.buffers().items()}
