"""Which samples each rank uses in each step.

The samples of a step depend only on the seed, the epoch and the position in it. So any number of workers, with any
gradient accumulation, trains on the same batches, and a resumed run needs only its position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True)
class Share:
    """One optimizer step: the number of its samples over all ranks, and this rank's part of each backward pass.

    ``micro_batches[i]`` is a range (start, stop) of the epoch's permutation; it may be empty.
    """

    num_samples: int
    micro_batches: tuple[tuple[int, int], ...]


class ShardedSampler(Sampler[list[int]]):
    """Goes through a new permutation of the samples in each epoch, ``batch_size`` of them per step.

    The samples of a step are split over its backward passes, then over the ranks, in order and as evenly as possible.
    The last step of an epoch uses the remaining samples; some ranks may get none. So every sample is used exactly once
    per epoch, unless ``drop_last`` leaves out that smaller step.

    Iterating yields this rank's non-empty micro-batches from the position to the end of the epoch. It does not change
    the position, since loaders read ahead; ``advance`` does.

    Args:
        num_samples: samples in an epoch.
        batch_size: samples of an optimizer step, over all ranks and backward passes.
        accumulation: backward passes of an optimizer step.
        seed: of the permutations.
        rank, world_size: of this rank.
        drop_last: leave out the last step of an epoch if it is smaller.

    Attributes:
        epoch: complete epochs.
        offset: samples of the current epoch that have been used, over all ranks.
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
        """Where the epoch ends. All steps from the position on have the current batch size."""
        remaining = self.num_samples - self.offset
        return self.offset + remaining // self.batch_size * self.batch_size if self._drop_last else self.num_samples

    def resize(self, batch_size: int, accumulation: int) -> None:
        """Continue from the position with another batch size, which need not divide evenly.

        Existing iterators keep the old size: create new ones.
        """
        self.batch_size, self.accumulation = batch_size, accumulation
        self._end_epoch()  # the remaining samples may no longer make a step

    def shares(self) -> Iterator[Share]:
        """Return the steps from the position to the end of the epoch."""
        return (self._share(start) for start in range(self.offset, self._end, self.batch_size))

    def samples_per_part(self, share: Share) -> list[int]:
        """Return the sizes of the parts of a step whose gradients measure noise.

        These are the ranks' samples; with a single process, those of its first backward pass.
        """
        passes = [_part(0, share.num_samples, index, self.accumulation) for index in range(self.accumulation)]
        if self.world_size == 1:
            return [passes[0][1]]
        parts = [[_part(*one, rank, self.world_size) for one in passes] for rank in range(self.world_size)]
        return [sum(stop - start for start, stop in own) for own in parts]

    def indices(self, share: Share) -> list[int]:
        """Return this rank's samples of a step of the current epoch, as indices into the data."""
        permutation = self._permutation(self.epoch)
        return [int(index) for start, stop in share.micro_batches for index in permutation[start:stop]]

    def _permutation(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)

    def _share(self, start: int) -> Share:
        stop = min(start + self.batch_size, self.num_samples)
        passes = (_part(start, stop, index, self.accumulation) for index in range(self.accumulation))
        return Share(stop - start, tuple(_part(*part, self.rank, self.world_size) for part in passes))

    def advance(self, share: Share) -> None:
        """Move the position past a step."""
        self.offset += share.num_samples
        self._end_epoch()

    def _end_epoch(self) -> None:
        if self.offset > 0 and self.offset >= self._end:
            self.epoch, self.offset = self.epoch + 1, 0

    def __iter__(self) -> Iterator[list[int]]:
        # The position is read now, not when the generator yields its first batch.
        return self._indices(self.epoch, self.shares())

    def _indices(self, epoch: int, shares: Iterator[Share]) -> Iterator[list[int]]:
        permutation = self._permutation(epoch)
        for share in shares:
            for start, stop in share.micro_batches:
                if start < stop:
                    yield permutation[start:stop].tolist()


def _part(start: int, stop: int, index: int, num_parts: int) -> tuple[int, int]:
    """Return the index-th of ``num_parts`` ranges that split start..stop; their lengths differ by at most one."""
    length = stop - start
    return start + length * index // num_parts, start + length * (index + 1) // num_parts
