"""Checkpoints without a run around them."""

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
    """Let a writer save it as ``folder/step-<step>``."""
    contents = Contents.of(comm, model, optimizer, parts or {}, flush=flush)
    facts = {"run": run, "step": step, "progress": progress or {}, "config": config or {}, "metrics": metrics or {}}
    return writer.take(folder, "test", contents, facts, keep=lambda: prune(folder, keep, best))


def save(
    comm: Communicator, folder: Path, model: nn.Module, optimizer: DistributedOptimizer, step: int, **options: Any
) -> Path:
    """Write ``folder/step-<step>`` together with the other ranks, at once."""
    writer = Writer(comm, 1)
    try:
        path = take(writer, comm, folder, model, optimizer, step, **options)
        writer.settle()
    finally:
        writer.close()
    return path
