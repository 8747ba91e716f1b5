"""Loading the batches of this rank, for training and evaluation."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.connection import Listener
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from disttrain.comm import Communicator
from disttrain.errors import UserError
from disttrain.training.config import Config
from disttrain.training.data.sampler import ShardedSampler
from disttrain.training.run.interruption import ignore_signals


def train_batches(config: Config, data: Dataset[Any], sampler: ShardedSampler, comm: Communicator) -> Iterator[Any]:
    """Return this rank's micro-batches from the sampler's position to the end of the epoch.

    The seeds of loader processes come from a private generator, so that iterating does not advance torch's global one.
    """
    key = [sampler.seed, sampler.rank, sampler.epoch, sampler.offset]
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
    return _loader(config, data, sampler, comm, generator)


def eval_batches(config: Config, data: Dataset[Any], comm: Communicator) -> Iterator[Any]:
    """Return every ``world_size``-th batch, so that any number of workers evaluates the same batches."""
    num_samples, size = num_samples_of(data), config.evaluation.batch_size
    starts = range(comm.rank * size, num_samples, comm.world_size * size)
    batches = [list(range(start, min(start + size, num_samples))) for start in starts]
    return _loader(config, data, batches, comm, torch.Generator())


def check_loader_workers() -> None:
    """Raise UserError if loader processes could not send their batches.

    They use sockets in the folder of temporary files, whose paths are limited to about 100 characters. A process that
    cannot make its socket prints a traceback, and the worker would wait for it.
    """
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        raise UserError(
            f"loader_workers cannot create a socket in the folder of temporary files, {tempfile.gettempdir()!r} "
            f"({error}): set TMPDIR to a folder with a short path, such as /tmp, or loader_workers=0"
        ) from error


def first_batch(config: Config, data: Dataset[Any]) -> Any:
    """Return a batch of the first sample only, to try out a task."""
    return next(iter(DataLoader(data, batch_sampler=[[0]], collate_fn=config.task.collate)))


def _loader(
    config: Config, data: Dataset[Any], batches: Iterable[list[int]], comm: Communicator, generator: torch.Generator
) -> Iterator[Any]:
    """Return an iterator over the batches. It raises UserError if a loader process dies or exceeds ``timeout``."""
    loader = DataLoader(
        data,
        batch_sampler=batches,
        timeout=config.timeout if config.loader_workers else 0,  # otherwise one that hangs blocks forever
        collate_fn=config.task.collate,
        num_workers=config.loader_workers,
        worker_init_fn=ignore_signals,
        pin_memory=comm.device.type == "cuda",
        generator=generator,
    )
    if not config.loader_workers:
        return iter(loader)
    return _watched(loader, config.timeout)


def _watched(loader: DataLoader[Any], timeout: float) -> Iterator[Any]:
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    workers = set(multiprocessing.active_children()) - others
    try:
        yield from batches
    except RuntimeError as error:
        # Errors of the dataset itself carry the traceback of the process, and are for the user to read.
        if not str(error).startswith("DataLoader "):
            raise
        for worker in workers:
            worker.kill()  # they ignore SIGTERM and SIGINT, and would outlive this process
            while worker.is_alive():
                with contextlib.suppress(RuntimeError):  # torch's SIGCHLD handler may raise here
                    worker.join()
        raise UserError(
            f"a loader process has died, or has sent no batch within timeout={timeout:g} s ({error}): check whether "
            "memory runs out, raise timeout, or set loader_workers=0 to see what fails"
        ) from error


def num_samples_of(data: Dataset[Any]) -> int:
    """Return the length of a dataset.

    Raises:
        UserError: it has no length, or is empty.
    """
    try:
        num_samples = len(data)  # type: ignore[arg-type]
    except TypeError as error:
        raise UserError(f"{type(data).__name__} has no length: data must be map-style, with __len__") from error
    if num_samples == 0:
        raise UserError(f"{type(data).__name__} is empty: the task's data has no samples")
    return num_samples


def to_device(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a batch with all tensors (in tuples, lists, mappings) on the device, floating-point ones as ``dtype``."""
    if isinstance(batch, torch.Tensor):
        target = dtype if batch.is_floating_point() else batch.dtype
        return batch.to(device, target, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [to_device(value, device, dtype) for value in batch]
        if hasattr(batch, "_fields"):  # a named tuple
            return type(batch)(*parts)
        return type(batch)(parts)
    return batch
