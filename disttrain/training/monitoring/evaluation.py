"""Evaluation on held-out data, distributed over the ranks."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from disttrain.comm import Communicator
from disttrain.errors import UserError
from disttrain.tasks import Task
from disttrain.training.config import Config
from disttrain.training.data.loading import eval_batches, first_batch, num_samples_of, to_device
from disttrain.training.precision import autocast
from disttrain.validation import hint


class Evaluator:
    """Evaluates a run's model on the task's held-out data.

    Attributes:
        num_samples: of the held-out data; 0 if the task has none.

    Raises:
        UserError: the data has no length, or is empty.
    """

    def __init__(self, config: Config, model: nn.Module, comm: Communicator) -> None:
        self._config, self._model, self._comm = config, model, comm
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._data: Dataset[Any] | None = config.task.eval_data()
        self._metric_names: list[str] | None = None
        self.num_samples = _count_held_out(self._data)

    def run(self) -> dict[str, float]:
        """Return every metric; empty without held-out data. A collective."""
        if self._data is None:
            return {}
        batches = eval_batches(self._config, self._data, self._comm)
        with autocast(self._config.precision, self._comm.device):
            return evaluate(self._config.task, self._model, batches, self._comm, self._dtype)

    def check_metric(self, key: str, metric: str, *others: str) -> None:
        """Check that evaluation will return the metric that a config key names, before hours have been spent.

        Args:
            key: of the config.
            metric: its value.
            others: further values that are valid, to be suggested.

        Raises:
            UserError: it will not.
        """
        if self._data is None:
            raise UserError(f"{key}={metric!r} needs held-out data, and the task has none: remove it")
        if self._metric_names is None:
            batch = to_device(first_batch(self._config, self._data), self._comm.device, self._dtype)
            with torch.no_grad(), eval_mode(self._model), autocast(self._config.precision, self._comm.device):
                self._metric_names = list(self._config.task.evaluate(self._model, batch))
        if metric not in self._metric_names:
            choices = hint(metric, [*others, *self._metric_names])
            raise UserError(f"{key}={metric!r} is not a metric of the task{choices}")


def _count_held_out(data: Dataset[Any] | None) -> int:
    if data is None:
        return 0
    try:
        return num_samples_of(data)
    except UserError as error:
        raise UserError(f"held-out data: {error}; to evaluate nothing, let eval_data return None") from error


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode within the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, batches: Iterable[Any], comm: Communicator, dtype: torch.dtype
) -> dict[str, float]:
    """Return every metric over the batches of all ranks, the same on all ranks. A collective."""
    totals: defaultdict[str, torch.Tensor] = defaultdict(
        lambda: torch.zeros(2, dtype=torch.float64, device=comm.device)
    )
    with eval_mode(model):
        for batch in batches:
            for name, (total, count) in task.evaluate(model, to_device(batch, comm.device, dtype)).items():
                totals[name] += torch.stack(
                    [torch.as_tensor(value, device=comm.device).double() for value in (total, count)]
                )
    # A rank that had no batch knows no names.
    names = sorted({name for names in comm.all_gather_object(list(totals)) for name in names})
    if not names:
        return {}
    sums, counts = comm.all_reduce(torch.stack([totals[name] for name in names])).unbind(1)
    return dict(zip(names, (sums / counts).tolist(), strict=True))
