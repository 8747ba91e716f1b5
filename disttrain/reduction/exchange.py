"""Exchanging a bucket: a compressor's program, run one collective at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch

from disttrain.collectives import Collective, Result
from disttrain.comm.base import Communicator
from disttrain.comm.work import Work
from disttrain.compression.base import Bucket, Compressor, NewState, Program, dry_run
from disttrain.compression.whitening import BucketWhitening, Whitening
from disttrain.kernels import for_device
from disttrain.reduction.measurements.ledger import AGREEMENT, Account, Ledger

Outcome = tuple[torch.Tensor, NewState]


class Executor:
    """Starts collectives and counts them.

    Args:
        comm: the channel of the collectives.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm, self.ledger = comm, Ledger(comm)

    def start(
        self, collective: Collective, account: Account = AGREEMENT, comm: Communicator | None = None
    ) -> Work[Result]:
        """Start a collective on ``comm``, by default the executor's own, without waiting for it."""
        comm = comm or self.comm
        group = comm.group(collective.group)
        count_received = self.ledger.record(collective, account, group.world_size, group.rank)
        return comm.start(collective, account=account).then(count_received)


class Exchange:
    """The program of one bucket. Its first collective starts immediately; ``advance`` runs it up to the next one."""

    def __init__(self, program: Program, executor: Executor, account: Account = AGREEMENT) -> None:
        self._program, self._executor, self._account = program, executor, account
        self._device_type = "cpu" if account.bucket is None else account.bucket.device.type
        self._work: Work[Result] | None = None
        self.outcome: Outcome | None = None
        self._resume(None)

    def advance(self) -> None:
        """Wait for the collective in flight, pass its result to the program, and start the next one."""
        assert self._work is not None
        self._resume(self._work.wait())

    def _resume(self, result: Result | None) -> None:
        with torch.no_grad(), torch.autocast(self._device_type, enabled=False):  # backward may run under autocast
            try:
                self._work = self._executor.start(self._program.send(result), self._account)
            except StopIteration as stop:
                self._work, self.outcome = None, cast("Outcome", stop.value)


def rehearse(
    compressor: Compressor,
    whitening: Whitening | None,
    dtype: torch.dtype,
    device: torch.device,
    world_size: int,
) -> None:
    """Run small programs on one rank, so that all kernels are compiled or loaded before the first training step."""
    generator, kernels = torch.Generator().manual_seed(0), for_device(device)
    # A dry run hands this rank's own chunk to all ranks, so sizes are such that all chunks of a bucket have one length.
    # Triton specializes on integers that are multiples of 16, hence the odd size.
    for shape, size in [((128, 128), 1), ((129, 127), 1), ((128, 128), 2), ((2 * world_size, 128), world_size)]:
        bucket = Bucket(("rehearsal",), (shape,), dtype, device, 0, size)
        state = compressor.init_state(bucket)
        units = None if whitening is None else BucketWhitening(whitening, bucket, state)
        for _ in range(2):  # some compressors alternate between two steps
            grad = torch.randn(bucket.numel, generator=generator, dtype=dtype).to(device)
            if units is None:
                program = compressor.reduce(grad, bucket, state)
            else:
                kernels.whitened_squares(grad, units.scale, [bucket.numel])
                kernels.hold_second_moment(units.scale, grad, (0.0, 1.0, 0.5, 0.5), torch.empty_like(grad))
                program = units.reduce(compressor, grad)
            state.commit(dry_run(program, bucket)[1])


def finish(exchanges: Sequence[Exchange]) -> Iterator[tuple[int, Outcome]]:
    """Run all programs to their ends, and yield (index, outcome) as they end.

    Programs advance in turns, in a fixed order, so that all ranks start the same collectives in the same order.
    """
    unfinished = dict(enumerate(exchanges))
    while unfinished:
        for index, exchange in list(unfinished.items()):
            if exchange.outcome is None:
                exchange.advance()
            if exchange.outcome is not None:
                del unfinished[index]
                yield index, exchange.outcome
