"""One quiet training run in this process: what the benches of accuracy share."""

from __future__ import annotations

import io
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from disttrain.comm import Communicator, simulate
from disttrain.training import config as configs
from disttrain.training.config import Config
from disttrain.training.trainer import Trainer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Nothing is saved, and held-out data are looked at once.
ONLY_THE_END = [
    "checkpoint.every_epochs=null", "checkpoint.every_steps=null", "evaluation.every_epochs=null",
    "evaluation.every_steps=null",
]  # fmt: skip


class Task(str, Enum):
    DIGITS = "digits"
    TEXT = "text"


METRIC = {Task.DIGITS: "accuracy", Task.TEXT: "bits_per_byte"}


def load(name: str, directory: str, settings: Sequence[str]) -> Config:
    """configs/<name>.yaml with overrides, that writes to ``directory`` and next to nothing else."""
    return configs.load(
        CONFIGS / f"{name}.yaml", [f"output={directory}", "log_every=1000000", "num_threads=1", *settings]
    )


def train(config: Config, world_size: int) -> tuple[dict[str, Any], Trainer]:
    """Train on virtual ranks, in one thread: rank 0's summary, and its trainer as the run has left it."""
    torch.set_num_threads(1)

    def run(comm: Communicator) -> tuple[dict[str, Any], Trainer]:
        trainer = Trainer(config, comm, Console(file=io.StringIO()))
        try:
            return trainer.run(), trainer
        finally:
            trainer.close()

    return simulate(world_size, run, in_turns=True)[0]
