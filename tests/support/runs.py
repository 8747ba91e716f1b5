"""Runs of the tiny task on simulated ranks."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from disttrain.comm import Communicator, simulate
from disttrain.training import config as configs
from disttrain.training.config import Config
from disttrain.training.trainer import Trainer

RESULT = tuple[dict[str, Any], dict[str, torch.Tensor]]


def make_config(output: Path, **changes: Any) -> Config:
    values = {
        "name": "test",
        "output": str(output),
        "task": {"name": "tests.support.tiny_task:Tiny", **changes.pop("task", {})},
        "dtype": "float64",
        "batch_size": 24,
        "epochs": 3,
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "log_every": 1,
        "num_threads": torch.get_num_threads(),
    }
    return configs.from_dict({**values, **changes})


def train(config: Config, comm: Communicator, before_step: Callable[[Trainer], None] = lambda trainer: None) -> RESULT:
    trainer = Trainer(config, comm, Console(file=io.StringIO()))
    step = trainer.train_step

    def watched(*args: Any) -> torch.Tensor:
        before_step(trainer)
        return step(*args)

    trainer.train_step = watched  # type: ignore[method-assign]
    try:
        return trainer.run(), {name: value.clone() for name, value in trainer.model.state_dict().items()}
    finally:
        trainer.close()


def records(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]


def untimed_records(config: Config) -> list[dict[str, Any]]:
    """Return the records without timings, which differ between runs."""
    return [
        {k: v for k, v in record.items() if k != "samples_per_second" and not k.endswith("_seconds")}
        for record in records(config)
    ]


def stop_run(config: Config, world_size: int, step: int) -> None:
    """Train up to a step, as if the ranks were killed before the next one."""

    def stop(trainer: Trainer) -> None:
        if trainer.progress.step == step:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        simulate(world_size, lambda comm: train(config, comm, stop))
