"""What is trained: a task names a model, its data, its loss and its metrics. It knows nothing of ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from disttrain.validation import Section


class Task(Section, ABC):
    """One thing to train. Its fields are the config's ``task:`` section, so give them bounds and descriptions.

    The type of a field that holds a path is ``disttrain.tasks.LocalPath``, a string in which ``~`` is expanded.

    >>> class Line(Task):
    ...     slope: float = Field(2.0, description="what the model has to find")
    ...     def build_model(self): return nn.Linear(1, 1)
    ...     def train_data(self): return TensorData(x := torch.randn(100, 1), self.slope * x)
    ...     def loss(self, model, batch): return F.mse_loss(model(batch[0]), batch[1])

    A config selects it by its import path: ``task: {name: "mymodule:Line", slope: 3.0}``.
    """

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A new model, initialised from torch's global generator (seeded alike on all ranks)."""

    @abstractmethod
    def train_data(self) -> Dataset[Any]:
        """A map-style dataset with a length, equal on all ranks. Each sample is seen once an epoch."""

    def eval_data(self) -> Dataset[Any] | None:
        """Held-out data, or None: then nothing is evaluated."""
        return None

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor | tuple[torch.Tensor, float | torch.Tensor]:
        """The mean of the loss over the samples of ``batch``, as a 0-d tensor.

        A mean over something else comes with its weight, ``(loss, weight)``: the number of tokens that are no padding,
        or the sum of the samples' class weights. Ranks and accumulation steps are weighted by that; without it, by
        their numbers of samples. All batches of a task have weights, or none.
        """

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[torch.Tensor | float, int]]:
        """For each metric its sum over the batch, and the count to divide the total sum by."""
        return {}

    def collate(self, samples: Any) -> Any:
        """Make a batch of a list of samples. What ``__getitems__`` has batched already (no list) stays as it is."""
        return default_collate(samples) if isinstance(samples, list) else samples


class TensorData(Dataset[tuple[torch.Tensor, ...]]):
    """Samples held in tensors, equal in length along dimension 0; a batch is picked in one indexing operation."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(part[0] for part in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        chosen = torch.as_tensor(indices)
        return tuple(tensor[chosen] for tensor in self.tensors)
