"""Training runs of the accuracy benchmarks: quiet, in one process each, several side by side."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from enum import Enum
from typing import Any

import torch
from rich.console import Console

from benchmarks.common.machine import ROOT
from benchmarks.common.statistics import Run
from disttrain.comm import Communicator, simulate
from disttrain.training import config as configs
from disttrain.training.config import Config
from disttrain.training.trainer import Trainer

# No checkpoints, and evaluation only at the end.
FINAL_EVALUATION_ONLY = [
    "checkpoint.every_epochs=null", "checkpoint.every_steps=null", "evaluation.every_epochs=null",
    "evaluation.every_steps=null",
]  # fmt: skip


class Task(str, Enum):
    DIGITS = "digits"
    TEXT = "text"


METRIC = {Task.DIGITS: "accuracy", Task.TEXT: "bits_per_byte"}


def find_metric(run: Run) -> str:
    """Return the name of the metric by which a run's task is judged."""
    return next(metric for metric in METRIC.values() if metric in run["metrics"])


def load_config(name: str, directory: str, settings: Sequence[str]) -> Config:
    """Load configs/<name>.yaml with overrides. Output goes to ``directory``, with almost no logging."""
    path = ROOT / "configs" / f"{name}.yaml"
    return configs.load(path, [f"output={directory}", "log_every=1000000", "num_threads=1", *settings])


def run_training(config: Config, world_size: int) -> tuple[dict[str, Any], Trainer]:
    """Train on simulated ranks in one thread and return rank 0's summary and trainer."""
    torch.set_num_threads(1)

    def run(comm: Communicator) -> tuple[dict[str, Any], Trainer]:
        trainer = Trainer(config, comm, Console(file=io.StringIO()))
        try:
            return trainer.run(), trainer
        finally:
            trainer.close()

    return simulate(world_size, run, in_turns=True)[0]


def run_side_by_side(
    function: Callable[..., dict[str, Any]], calls: Sequence[tuple[Run, tuple[Any, ...]]], jobs: int
) -> list[Run]:
    """Call ``function`` in processes of its own and print each finished run to stderr as a line of JSON.

    Args:
        function: trains one run and returns its results.
        calls: for each run its description and the arguments of ``function``.
        jobs: number of processes.

    Returns:
        The runs in the order of ``calls``: descriptions, each with its results added.
    """
    runs = []
    with ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(function, *arguments) for _, arguments in calls]
        for (description, _), future in zip(calls, futures, strict=True):
            runs.append({**description, **future.result()})
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    return runs
