"""The loops by name. ``@loop()`` registers a function, which then runs in every form."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

LOOPS: dict[str, Loop] = {}

# One of each family, with options under which small parameters have a residual too.
COMPRESSORS: dict[str, dict[str, Any]] = {
    "topk": {"name": "topk", "ratio": 0.25, "min_numel": 1},
    "efsign": {"name": "efsign", "min_numel": 1},
    "powersgd": {"name": "powersgd", "rank": 1, "min_numel": 1},
    "qsgd": {"name": "qsgd", "bits": 4, "error_feedback": True, "min_numel": 1},
    "blockwise8": {"name": "blockwise8", "min_numel": 1},
    "randomk": {"name": "randomk", "ratio": 0.25, "min_numel": 1},
    "fp16": {"name": "fp16"},
}


@dataclass(frozen=True)
class Loop:
    """A training loop, and how it can be run and checked.

    Attributes:
        run: called with the world. Its result is compared: modules (by parameter), tensors and numbers, also in lists
            and dicts. It must be the same on all ranks.
        reference: what one process runs in place of ``run``, if ``run`` cannot act as several ranks.
        without_ddp: why torch DDP cannot run it, or gives another result. None: it must give the same.
        without_threads: why virtual ranks, threads of one process, cannot run it. None: they can.
        compressors: names in ``COMPRESSORS`` with which it makes sense.
        telescopes: whether it is plain SGD at a constant rate on unchanged gradients, so that received updates and
            residuals must add up to the sum of all gradients.
        tolerance: largest absolute difference from one process.
        world_sizes: numbers of ranks that it supports.
        engines: further engines that run it, as some of the loops do: "mpi", "horovod".
    """

    name: str
    run: Callable[[Any], Any]
    reference: Callable[[Any], Any] | None
    without_ddp: str | None
    without_threads: str | None
    compressors: Sequence[str]
    telescopes: bool
    tolerance: float
    world_sizes: Sequence[int]
    engines: Sequence[str]


def loop(
    *,
    reference: Callable[[Any], Any] | None = None,
    without_ddp: str | None = None,
    without_threads: str | None = None,
    compressors: Sequence[str] = tuple(COMPRESSORS),
    telescopes: bool = False,
    tolerance: float = 1e-9,
    world_sizes: Sequence[int] = (2, 3),
    engines: Sequence[str] = (),
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register a loop under its function's name; the options are ``Loop``'s attributes."""

    def register(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        name = run.__name__
        assert name not in LOOPS, f"two loops are named {name}"
        LOOPS[name] = Loop(
            name,
            run,
            reference,
            without_ddp,
            without_threads,
            compressors,
            telescopes,
            tolerance,
            world_sizes,
            engines,
        )
        return run

    return register


def load() -> dict[str, Loop]:
    """All loops: importing the files in ``loops/`` registers them."""
    package = importlib.import_module("tests.scripts.loops")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"tests.scripts.loops.{module.name}")
    return LOOPS
