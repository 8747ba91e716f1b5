"""Checkpoints without a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from disttrain.comm import Communicator
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.training.checkpoints.contents import Contents
from disttrain.training.checkpoints.folder import Best, prune
from disttrain.training.checkpoints.writer import Writer

RUN = "0123456789abcdef" * 2


def take(
    writer: Writer,
    comm: Communicator,
    folder: Path,
    model: nn.Module,
    optimizer: DistributedOptimizer,
    step: int,
    *,
    keep: int = 2,
    best: Best | None = None,
    metrics: Mapping[str, float] | None = None,
    progress: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    parts: Mapping[str, Any] | None = None,
    run: str = RUN,
    flush: bool = False,
) -> Path:
    """Let a writer start to write ``folder/step-<step>``."""
    contents = Contents.collect(comm, model, optimizer, parts or {}, flush=flush)
    facts = {"run": run, "step": step, "progress": progress or {}, "config": config or {}, "metrics": metrics or {}}
    return writer.start(folder, "test", contents, facts, on_complete=lambda: prune(folder, keep, best))


def save(
    comm: Communicator, folder: Path, model: nn.Module, optimizer: DistributedOptimizer, step: int, **options: Any
) -> Path:
    """Write ``folder/step-<step>`` with the other ranks, and wait for it."""
    writer = Writer(comm, 1)
    try:
        path = take(writer, comm, folder, model, optimizer, step, **options)
        writer.wait_for_oldest()
    finally:
        writer.close()
    return path
