"""Interrupted runs: all ranks stop after the same step, with a checkpoint that resumes exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import disttrain
from disttrain.comm import Communicator, SingleProcess, simulate
from disttrain.errors import INTERRUPTING_SIGNALS
from disttrain.training.config import Config
from disttrain.training.run import interruption
from disttrain.training.run.interruption import Interruption, ignore_signals
from disttrain.training.trainer import Trainer
from tests.support.runs import make_config, train, untimed_records

pytestmark = pytest.mark.usefixtures("one_thread", "handlers")


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in INTERRUPTING_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def asked(config: Config, comm: Communicator, *, rank: int, step: int) -> Any:
    """Train; in that step, that rank is asked to stop."""

    def ask(trainer: Trainer) -> None:
        if (comm.rank, trainer.progress.step) == (rank, step):
            trainer.interruption.request("SIGTERM")

    return train(config, comm, ask)


@pytest.mark.parametrize(
    "changes",
    [
        {"compressor": {"name": "topk", "ratio": 0.2, "min_numel": 1}},
        {
            "batch": {"name": "schedule", "milestones": [1], "max_batch_size": 48},
            "precision": "fp16",
            "dtype": "float32",
        },
        {"early_stopping": {"metric": "error", "mode": "min", "patience": 1}, "average": {"decay": 0.9}},
        {"task": {"batch_norm": True, "num_samples": 52}, "drop_last": True, "average": {"decay": 0.9}},
    ],
)
def test_all_ranks_stop_after_the_same_step_and_the_run_resumes_exactly(tmp_path: Path, changes: Any) -> None:
    def config(folder: str, **more: Any) -> Config:
        return make_config(tmp_path / folder, **changes, **more)

    whole = simulate(3, lambda comm: train(config("whole"), comm))
    stopped = simulate(3, lambda comm: asked(config("stopped"), comm, rank=2, step=3))
    for summary, _ in stopped:
        assert (summary["steps"], summary["ended_by"]) == (4, "interrupted")
        assert summary["interrupted_by"].startswith("SIGTERM on rank 2 (host ")
        assert Path(summary["checkpoint"]).name == "step-00000004"
    resumed = simulate(3, lambda comm: train(config("stopped", resume="auto"), comm))
    for (expected, weights), (summary, resumed_weights) in zip(whole, resumed, strict=True):
        assert {**summary, "seconds": 0, "samples_per_second": 0} == {
            **expected,
            "seconds": 0,
            "samples_per_second": 0,
        }
        for name, value in weights.items():
            assert resumed_weights[name].equal(value), name
    assert untimed_records(config("stopped")) == untimed_records(config("whole"))


def test_without_checkpoints_the_run_just_ends(tmp_path: Path) -> None:
    config = make_config(tmp_path, checkpoint={"every_epochs": None})
    for summary, _ in simulate(2, lambda comm: asked(config, comm, rank=0, step=1)):
        assert (summary["steps"], summary["ended_by"], summary["checkpoint"]) == (2, "interrupted", None)
    assert not (config.directory / "checkpoints").exists()


def test_a_run_asked_in_its_last_step_has_ended_as_it_should(tmp_path: Path) -> None:
    config = make_config(tmp_path, max_steps=3)
    for summary, _ in simulate(2, lambda comm: asked(config, comm, rank=1, step=2)):
        assert (summary["steps"], summary["ended_by"]) == (3, "last_step")
        assert "error" in summary["metrics"]


@pytest.mark.parametrize("number", INTERRUPTING_SIGNALS)
def test_a_signal_stops_the_run_and_later_ones_are_ignored(tmp_path: Path, number: signal.Signals) -> None:
    def send(trainer: Trainer) -> None:
        if trainer.progress.step == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # as a terminal and the launcher do

    summary, _ = train(make_config(tmp_path), SingleProcess(), send)
    assert (summary["steps"], summary["interrupted_by"].split(" (")[0]) == (3, f"{number.name} on rank 0")
    assert [signal.getsignal(each) for each in INTERRUPTING_SIGNALS] == [signal.SIG_IGN] * 3


def test_handlers_are_put_back_and_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = {number: signal.getsignal(number) for number in INTERRUPTING_SIGNALS}
    seen = []
    train(make_config(tmp_path, max_steps=2), SingleProcess(), lambda _: seen.append(signal.getsignal(signal.SIGINT)))
    assert seen == [signal.SIG_IGN] * 2
    assert {number: signal.getsignal(number) for number in INTERRUPTING_SIGNALS} == before


def test_a_second_signal_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    killed, clock = [], [100.0]
    monkeypatch.setattr(interruption.os, "kill", lambda *arguments: killed.append(arguments))
    monkeypatch.setattr(interruption.time, "monotonic", lambda: clock[0])
    model = torch.nn.Linear(2, 1)
    optimizer = disttrain.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=SingleProcess())
    with Interruption(optimizer):
        for moment, wanted in ((100.0, []), (100.9, []), (101.1, [(os.getpid(), signal.SIGTERM)])):
            clock[0] = moment
            signal.raise_signal(signal.SIGTERM)
            assert killed == wanted
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class _Signaled(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        for number in INTERRUPTING_SIGNALS:
            os.kill(os.getpid(), number)
        return index


def test_processes_that_load_data_are_left_alone_by_signals() -> None:
    loader = DataLoader(_Signaled(), num_workers=1, worker_init_fn=ignore_signals)
    assert [int(batch) for batch in loader] == [0, 1]


EXITS = """
import torch
from torch.utils.data import DataLoader
from disttrain.training.run.interruption import ignore_signals

iterator = iter(DataLoader(torch.zeros(64, 1), num_workers=2, worker_init_fn=ignore_signals))
next(iterator)
"""


def test_a_program_with_processes_that_load_data_can_exit() -> None:
    """It ends them by SIGTERM and waits for them, while its iterator is alive."""
    subprocess.run([sys.executable, "-c", EXITS], check=True, timeout=60)
