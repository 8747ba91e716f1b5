"""A compressor's program on its way over the wire."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch

from disttrain.collectives import Result
from disttrain.comm.work import Work
from disttrain.compression.base import Bucket, Compressor, NewState, Program, dry_run
from disttrain.reduction.measurements.ledger import AGREEMENT, Account, Ledger

Outcome = tuple[torch.Tensor, NewState]


class Exchange:
    """One bucket's program: its first collective starts at once, ``advance`` takes it to the next one."""

    def __init__(self, program: Program, ledger: Ledger, account: Account = AGREEMENT) -> None:
        self._program, self._ledger, self._account = program, ledger, account
        self._device_type = "cpu" if account.bucket is None else account.bucket.device.type
        self._work: Work[Result] | None = None
        self.outcome: Outcome | None = None
        self._resume(None)

    def advance(self) -> None:
        """Wait for the collective under way, hand its result to the program, start the next one."""
        assert self._work is not None
        self._resume(self._work.wait())

    def _resume(self, result: Result | None) -> None:
        with torch.no_grad(), torch.autocast(self._device_type, enabled=False):  # a backward pass may be within either
            self._run(result)

    def _run(self, result: Result | None) -> None:
        try:
            self._work = self._ledger.start(self._program.send(result), self._account)
        except StopIteration as stop:
            self._work, self.outcome = None, cast("Outcome", stop.value)


def rehearse(compressor: Compressor, dtype: torch.dtype, device: torch.device, world_size: int) -> None:
    """Run small programs by hand, so that all kernels are compiled (or loaded) before the first training step."""
    generator = torch.Generator().manual_seed(0)
    # All ranks' stretches of a bucket are alike in length, since a dry run gives them all this rank's own.
    # Some compilers have one form for sizes that are multiples of 16, and another: hence the odd one.
    for shape, size in [((128, 128), 1), ((129, 127), 1), ((128, 128), 2), ((2 * world_size, 128), world_size)]:
        bucket = Bucket(("rehearsal",), (shape,), dtype, device, 0, size)
        state = compressor.init_state(bucket)
        for _ in range(2):  # what alternates has kernels for either step
            grad = torch.randn(bucket.numel, generator=generator, dtype=dtype).to(device)
            state.commit(dry_run(compressor.reduce(grad, bucket, state), bucket)[1])


def finish(exchanges: Sequence[Exchange]) -> Iterator[tuple[int, Outcome]]:
    """Take every program to its end, yielding (index, outcome) as they end.

    Step by step and in order, so that all ranks start the same collectives alike.
    """
    unfinished = dict(enumerate(exchanges))
    while unfinished:
        for index, exchange in list(unfinished.items()):
            if exchange.outcome is None:
                exchange.advance()
            if exchange.outcome is not None:
                del unfinished[index]
                yield index, exchange.outcome
