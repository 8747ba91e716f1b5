"""What a process sets and makes before it trains."""

from __future__ import annotations

import os

import torch
from torch import nn

from disttrain.comm import Communicator
from disttrain.errors import UserError
from disttrain.optim.replicas.synchronization import check_has_values
from disttrain.tasks import Task


def build_model(task: Task) -> nn.Module:
    """The task's model.

    Raises:
        UserError: parameters or buffers have no values yet.
    """
    model = task.build_model()
    try:
        check_has_values(model)
    except UserError as error:
        raise UserError(f"{type(task).__name__}.build_model: {error}") from error
    return model


def set_up_torch(comm: Communicator, num_threads: int | None, deterministic: bool) -> None:
    """Share the host's cores among its workers; prefer algorithms that give the same bits in every run."""
    if num_threads is None:
        num_threads = max(1, len(os.sched_getaffinity(0)) // comm.local_size)
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)
    if comm.device.type == "cuda":  # what torch does on a CPU is deterministic already
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
