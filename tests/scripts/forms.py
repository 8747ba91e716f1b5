"""The forms that every loop runs in, and the checks of each."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from disttrain.comm import Communicator, simulate
from tests.scripts.judge import Numbers, Result, check_alike, check_balance, check_equal, check_finite, flatten
from tests.scripts.registry import COMPRESSORS, Loop, load
from tests.scripts.world import DataParallel, Disttrain, OneProcess, World


@dataclass(frozen=True)
class Form:
    """``compressor`` is None for torch DDP. ``launcher`` starts real processes; None: virtual ranks in threads."""

    name: str
    world_size: int
    compressor: str | None
    launcher: str | None

    @property
    def is_exact(self) -> bool:
        return self.compressor in (None, "dense")


DDP = Form("ddp", 2, None, "torch")
DENSE = [
    Form("dense-2", 2, "dense", "torch"),
    Form("dense-3", 3, "dense", None),
    Form("mpi", 2, "dense", "mpi"),
    Form("horovod", 2, "dense", "horovod-mpi"),
]
COMPRESSED = [Form(name, 2, name, None) for name in COMPRESSORS]
FORMS = {form.name: form for form in [DDP, *DENSE, *COMPRESSED]}


@dataclass
class Outcome:
    """The result of a loop on one rank."""

    result: Result
    balances: list[Numbers]


def form_of(loop: Loop, name: str) -> Form | None:
    """Return the form of that name, or None if the loop does not run in it.

    A loop that threads cannot run has its compressors on processes, and no three ranks.
    """
    form = FORMS[name]
    if form.world_size not in loop.world_sizes:
        return None
    if form is DDP:
        return None if loop.without_ddp else form
    if name in ("mpi", "horovod"):
        return form if name in loop.engines else None
    if form.compressor in COMPRESSORS and form.compressor not in loop.compressors:
        return None
    if form.launcher is None and loop.without_threads:
        return None if form.world_size == 3 else Form(name, form.world_size, form.compressor, "torch")
    return form


def cases(launcher: str | None) -> list[tuple[Loop, Form]]:
    """Return all loops in all forms that this launcher starts."""
    found = [(loop, form_of(loop, name)) for loop in load().values() for name in FORMS]
    return [(loop, form) for loop, form in found if form is not None and form.launcher == launcher]


def run_rank(loop: Loop, form: Form, comm: Communicator | None) -> Outcome:
    """Run one rank's part; ``comm`` is None under DDP, which uses torch's default process group."""
    if form.compressor is None:
        return Outcome(_run(loop.run, DataParallel()), [])
    assert comm is not None
    spec = COMPRESSORS.get(form.compressor, form.compressor)
    world = Disttrain(comm, spec, telescopes=loop.telescopes and form.compressor != "fp16")  # which rounds, and forgets
    try:
        result = _run(loop.run, world)
        return Outcome(result, [balance.numbers() for balance in world.balances])
    finally:
        world.close()


def _run(run: Any, world: World) -> Result:
    torch.manual_seed(0)
    return flatten(run(world))


@functools.cache
def reference(loop: Loop, world_size: int) -> Result:
    """Return the result of one process that acts as all ranks."""
    with settings():
        return _run(loop.reference or loop.run, OneProcess(world_size))


def judge(loop: Loop, form: Form, outcomes: Sequence[Outcome]) -> None:
    """Raise DifferenceError if results are wrong."""
    if form.is_exact:
        for outcome in outcomes:
            check_equal(outcome.result, reference(loop, form.world_size), loop.tolerance)
    check_finite(outcomes[0].result)
    if form.compressor is not None:
        check_alike([outcome.result for outcome in outcomes])
    for by_rank in zip(*(outcome.balances for outcome in outcomes), strict=True):
        check_balance(by_rank)


def run_threads(loop: Loop, form: Form) -> None:
    """Run the loop on virtual ranks and check the results."""
    with settings():
        ranks = simulate(form.world_size, lambda comm: run_rank(loop, form, comm), timeout=20.0, in_turns=True)
        judge(loop, form, ranks)


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Use float64 and one thread, and silence warnings of the optimizer that loops cause on purpose."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    logger = logging.getLogger("disttrain")
    level = logger.level
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        logger.setLevel(level)
