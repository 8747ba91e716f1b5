"""Evaluation, shared out among the ranks."""

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
from disttrain.training.data.loading import num_samples_of, to_device


def num_held_out_of(data: Dataset[Any] | None) -> int:
    """Samples of the held-out data that a task gives; 0 if it gives None.

    Raises:
        UserError: the data has no length, or no sample.
    """
    if data is None:
        return 0
    try:
        return num_samples_of(data)
    except UserError as error:
        raise UserError(f"held-out data: {error}; eval_data may return None, and nothing is evaluated") from error


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode."""
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
    """Every metric over all ranks' batches: the sums and counts are added up, so all ranks get the same values."""
    totals: defaultdict[str, torch.Tensor] = defaultdict(
        lambda: torch.zeros(2, dtype=torch.float64, device=comm.device)
    )
    with evaluating(model):
        for batch in batches:
            for name, (total, count) in task.evaluate(model, to_device(batch, comm.device, dtype)).items():
                totals[name] += torch.stack(
                    [torch.as_tensor(value, device=comm.device).double() for value in (total, count)]
                )
    # A rank may have had no batch, and so no names.
    names = sorted({name for names in comm.all_gather_object(list(totals)) for name in names})
    if not names:
        return {}
    sums, counts = comm.all_reduce(torch.stack([totals[name] for name in names])).unbind(1)
    return dict(zip(names, (sums / counts).tolist(), strict=True))
