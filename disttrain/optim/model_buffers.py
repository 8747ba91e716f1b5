"""Model buffers that differ by rank, such as BatchNorm statistics. Evaluation and checkpoints need their mean."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from disttrain.optim.averaging import BaseAverage
from disttrain.optim.distributed import DistributedOptimizer


class ModelBuffers:
    """The buffers of a model, and the averaged ones of its ``WeightAverage``."""

    def __init__(self, optimizer: DistributedOptimizer, average: BaseAverage) -> None:
        self._optimizer, self._average = optimizer, average

    def synchronize(self) -> None:
        """Replace the buffers by their means over ranks. Collective."""
        self._optimizer.synchronize_buffers()
        self._average.synchronize_buffers()

    @contextlib.contextmanager
    def synchronized(self) -> Iterator[dict[str, torch.Tensor]]:
        """Give the buffers their means over ranks inside the context, and this rank's own values back afterwards.

        So saving a checkpoint does not change the run. Yields this rank's own values. Collective.
        """
        own = {name: tensor.detach().clone() for name, tensor in self.live().items()}
        self.synchronize()
        try:
            yield own
        finally:
            self.load(own)

    @torch.no_grad()
    def load(self, own: Mapping[str, torch.Tensor]) -> None:
        """Load the values that ``synchronized`` yielded.

        Raises:
            KeyError, RuntimeError: The values belong to another model.
        """
        live = self.live()
        for name, tensor in own.items():
            live[name].copy_(tensor)
        self._optimizer.keep_buffers()

    def live(self) -> dict[str, torch.Tensor]:
        """Return this rank's buffers themselves, not copies, by name."""
        model = {f"model/{name}": tensor for name, tensor in self._optimizer.model.named_buffers()}
        return model | {f"average/{name}": tensor for name, tensor in self._average.buffers().items()}
