"""Base class of tasks. A task defines a model, its data, loss and metrics, and knows nothing of ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from disttrain.validation import Section


class Task(Section, ABC):
    """What to train. Fields are the config's ``task:`` section, so give them bounds and descriptions.

    Declare a field for a path as ``disttrain.tasks.LocalPath``, a string in which ``~`` is expanded.

    >>> class Line(Task):
    ...     slope: float = Field(2.0, description="slope of the line to fit")
    ...     def build_model(self): return nn.Linear(1, 1)
    ...     def train_data(self): return TensorData(x := torch.randn(100, 1), self.slope * x)
    ...     def loss(self, model, batch): return F.mse_loss(model(batch[0]), batch[1])

    A config selects it by its import path: ``task: {name: "mymodule:Line", slope: 3.0}``.
    """

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return a new model, initialized by torch's global generator, which has the same seed on all ranks."""

    @abstractmethod
    def train_data(self) -> Dataset[Any]:
        """Return a map-style dataset with a length, the same on all ranks. Each sample is used once per epoch."""

    def eval_data(self) -> Dataset[Any] | None:
        """Return held-out data, or None for no evaluation."""
        return None

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor | tuple[torch.Tensor, float | torch.Tensor]:
        """Return the mean loss over the samples of ``batch``, as a 0-d tensor.

        If the mean is not over samples, return ``(loss, weight)``, where the weight is for example the number of tokens
        without padding, or the sum of the samples' class weights. Ranks and micro-batches are combined by their
        weights, or by their numbers of samples if there are none. Either all batches of a task have weights, or none.
        """

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[torch.Tensor | float, int]]:
        """Return for each metric its sum over the batch and the count that the total is divided by."""
        return {}

    def collate(self, samples: Any) -> Any:
        """Return a batch from a list of samples. A batch that ``__getitems__`` has made is returned unchanged."""
        return default_collate(samples) if isinstance(samples, list) else samples


class TensorData(Dataset[tuple[torch.Tensor, ...]]):
    """Samples in tensors of equal length along dimension 0. A batch is taken in one indexing operation."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(part[0] for part in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        chosen = torch.as_tensor(indices)
        return tuple(tensor[chosen] for tensor in self.tensors)
