"""Which samples each rank sees in each step, and loading them.

The samples of a step depend on the seed, the epoch and the position in it alone. So any number of workers, with any
accumulation, trains on the same batches, and a run that goes on from a checkpoint needs nothing but its position.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Listener
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from disttrain.comm import Communicator
from disttrain.errors import UserError
from disttrain.training.config import Config
from disttrain.training.run.interruption import ignore_signals


@dataclass(frozen=True)
class Share:
    """One optimizer step: its samples over all ranks, and this rank's part of each backward pass.

    ``micro_batches[i]`` is a stretch (start, stop) of the epoch's permutation; it may be empty.
    """

    num_samples: int
    micro_batches: tuple[tuple[int, int], ...]


class ShardedSampler(Sampler[list[int]]):
    """Goes through a new permutation of the samples each epoch, ``batch_size`` of them a step.

    A step's samples are split over the accumulation's backward passes, then over the ranks, in order and as evenly as
    possible. The last step of an epoch takes what is left; some ranks may get nothing of it. So every sample is used
    exactly once an epoch, unless ``drop_last`` leaves that smaller step out.

    Iterating yields this rank's non-empty micro-batches, from the position on to the end of the epoch. It does not move
    the position, since a loader reads ahead: ``advance`` does.

    Attributes:
        epoch: whole epochs done.
        offset: samples of the present epoch that have been used, over all ranks.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        rank: int,
        world_size: int,
        drop_last: bool = False,
    ) -> None:
        self.steps_per_epoch = num_samples // batch_size if drop_last else -(-num_samples // batch_size)
        self.num_samples, self.batch_size, self.accumulation, self.seed = num_samples, batch_size, accumulation, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.offset, self._drop_last = 0, 0, drop_last

    @property
    def _end(self) -> int:
        """Where the epoch ends: all steps from the position on are of the present batch size."""
        rest = self.num_samples - self.offset
        return self.offset + rest // self.batch_size * self.batch_size if self._drop_last else self.num_samples

    def resize(self, batch_size: int, accumulation: int) -> None:
        """Go on from the position with another batch, not of necessity one that divides evenly.

        What iterates already goes on with the old one: begin anew.
        """
        self.batch_size, self.accumulation = batch_size, accumulation
        self._end_epoch()  # what is left of it may no longer make a step

    def shares(self) -> Iterator[Share]:
        """The steps from the position on to the end of the epoch."""
        return (self._share(start) for start in range(self.offset, self._end, self.batch_size))

    def part_sizes(self, share: Share) -> list[int]:
        """Samples of each rank in a step; in one process, of its first backward pass alone: parts to compare."""
        passes = [_part(0, share.num_samples, index, self.accumulation) for index in range(self.accumulation)]
        if self.world_size == 1:
            return [passes[0][1]]
        parts = [[_part(*one, rank, self.world_size) for one in passes] for rank in range(self.world_size)]
        return [sum(stop - start for start, stop in own) for own in parts]

    def indices(self, share: Share) -> list[int]:
        """This rank's samples of a step of the present epoch, as indices into the data."""
        permutation = self._permutation(self.epoch)
        return [int(index) for start, stop in share.micro_batches for index in permutation[start:stop]]

    def _permutation(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)

    def _share(self, start: int) -> Share:
        stop = min(start + self.batch_size, self.num_samples)
        passes = (_part(start, stop, index, self.accumulation) for index in range(self.accumulation))
        return Share(stop - start, tuple(_part(*part, self.rank, self.world_size) for part in passes))

    def advance(self, share: Share) -> None:
        """Note that a step has been taken."""
        self.offset += share.num_samples
        self._end_epoch()

    def _end_epoch(self) -> None:
        if self.offset > 0 and self.offset >= self._end:
            self.epoch, self.offset = self.epoch + 1, 0

    def __iter__(self) -> Iterator[list[int]]:
        return self._indices(self.epoch, self.shares())  # of the position now, not of the first batch's time

    def _indices(self, epoch: int, shares: Iterator[Share]) -> Iterator[list[int]]:
        permutation = self._permutation(epoch)
        for share in shares:
            for start, stop in share.micro_batches:
                if start < stop:
                    yield permutation[start:stop].tolist()


def train_batches(config: Config, data: Dataset[Any], sampler: ShardedSampler, comm: Communicator) -> Iterator[Any]:
    """This rank's micro-batches from the sampler's position to the end of the epoch.

    It draws the seeds of its processes from a private generator, so that iterating leaves torch's global one alone.
    """
    key = [sampler.seed, sampler.rank, sampler.epoch, sampler.offset]
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
    return _loader(config, data, sampler, comm, generator)


def eval_batches(config: Config, data: Dataset[Any], comm: Communicator) -> Iterator[Any]:
    """Every ``world_size``-th batch: the same batches are evaluated, whatever the number of workers."""
    num_samples, size = num_samples_of(data), config.evaluation.batch_size
    starts = range(comm.rank * size, num_samples, comm.world_size * size)
    batches = [list(range(start, min(start + size, num_samples))) for start in starts]
    return _loader(config, data, batches, comm, torch.Generator())


def check_loader_workers() -> None:
    """Raise UserError if processes that load data could not hand over what they have loaded.

    They do so through sockets in the folder of temporary files, whose paths may have about 100 characters. A process
    that cannot make its socket prints a traceback, and would be waited for.
    """
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        raise UserError(
            f"loader_workers need sockets in the folder of temporary files, {tempfile.gettempdir()!r}, which fails "
            f"({error}): set TMPDIR to a folder with a short path, such as /tmp, or loader_workers=0"
        ) from error


def first_batch(config: Config, data: Dataset[Any]) -> Any:
    """A batch of the first sample alone, to see what a task makes of it."""
    return next(iter(DataLoader(data, batch_sampler=[[0]], collate_fn=config.task.collate)))


def _loader(
    config: Config, data: Dataset[Any], batches: Iterable[list[int]], comm: Communicator, generator: torch.Generator
) -> Iterator[Any]:
    """The batches.

    Raises:
        UserError: a process that loads data has died, or has given nothing within ``timeout``.
    """
    loader = DataLoader(
        data,
        batch_sampler=batches,
        timeout=config.timeout if config.loader_workers else 0,  # one that hangs would be waited for without end
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
        # Of those that the dataset raises, torch says where they come from, and they are the user's to read.
        if not str(error).startswith("DataLoader "):
            raise
        for worker in workers:
            worker.kill()  # they ignore gentler signals, and would outlive this process
            while worker.is_alive():
                with contextlib.suppress(RuntimeError):  # torch raises that one was killed wherever the news come
                    worker.join()
        raise UserError(
            f"a process that loads data has died, or has given no batch within timeout={timeout:g} s ({error}): see "
            "whether memory runs out, raise timeout, or set loader_workers=0 to see what fails"
        ) from error


def num_samples_of(data: Dataset[Any]) -> int:
    """The length of a dataset.

    Raises:
        UserError: it has none, or is empty.
    """
    try:
        num_samples = len(data)  # type: ignore[arg-type]
    except TypeError as error:
        raise UserError(f"{type(data).__name__} has no length: data must be map-style, with __len__") from error
    if num_samples == 0:
        raise UserError(f"{type(data).__name__} is empty: the task's data holds no sample")
    return num_samples


def to_device(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """All tensors of a batch (in tuples, lists, mappings) on the device, floating-point ones as ``dtype``."""
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


def _part(start: int, stop: int, index: int, parts: int) -> tuple[int, int]:
    """The index-th of ``parts`` stretches of start..stop, equal but for one sample."""
    length = stop - start
    return start + length * index // parts, start + length * (index + 1) // parts
