"""Whole runs by real workers: what virtual ranks, which share one random generator, cannot show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.workers import LAUNCHERS, run, worker_environment

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

CONFIG = """
name: run
task: {name: "tests.support.tiny_task:Tiny", dropout: 0.3, batch_norm: true, num_samples: 52}
batch_size: 12
drop_last: true
accumulation: 2
max_steps: 12
optimizer: {name: adamw, lr: 0.01}
schedule: {name: cosine, warmup_steps: 3}
compressor: {name: topk, ratio: 0.1, min_numel: 1}
checkpoint: {every_epochs: null, every_steps: 3}
evaluation: {every_epochs: 1}
log_every: 1
"""


def train(output: Path, launcher: str, num_workers: int, *overrides: str, **env: str) -> Any:
    config = output / "config.yaml"
    config.write_text(CONFIG)
    command = [*LAUNCHERS[launcher][0](num_workers), "-m", "disttrain", "train", str(config), f"output={output}"]
    overrides = (*overrides, f"engine={LAUNCHERS[launcher][1]}")
    return run([*command, *overrides], timeout=120, env=worker_environment(**env), cwd=output)


def test_a_run_resumes_with_another_number_of_workers(tmp_path: Path) -> None:
    assert train(tmp_path, "torch", 3, "max_steps=6").returncode == 0
    done = train(tmp_path, "torch", 2, "resume=auto")
    assert done.returncode == 0, done.stderr
    assert "2 workers instead of 3: a batch of 12 is now 6 samples per worker, was 4;" in " ".join(done.stdout.split())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["steps"], summary["world_size"]) == (12, 2)


@pytest.mark.parametrize("launcher", ["torch", "mpi"])
def test_a_whitened_run_resumes_with_another_number_of_workers(tmp_path: Path, launcher: str) -> None:
    whiten = "{warmup_steps: 2, refresh_growth: 1.0, band: 1000000}"
    settings = (f"compressor={{name: efsign, min_numel: 1, whiten: {whiten}, dense_as: bf16}}", "max_steps=16")
    assert train(tmp_path, launcher, 3, *settings, "max_steps=6").returncode == 0
    done = train(tmp_path, launcher, 2, *settings, "resume=auto")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["steps"], summary["world_size"]) == (16, 2)
    traffic = summary["wire"]["by_compressor"]
    assert traffic["efsign"]["sent_bytes"] > traffic["bf16"]["sent_bytes"] > 0, "in steps 4 to 6 and 8 to 14; in others"


def test_a_mistake_that_one_rank_finds_is_reported_by_all(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\nfrom disttrain import UserError\nfrom tests.support.tiny_task import Tiny\n"
        "class Mine(Tiny):\n"
        "    def train_data(self):\n"
        "        if os.environ['RANK'] == '1':\n"
        "            raise UserError('the data is missing here')\n"
        "        return super().train_data()\n"
    )
    done = train(tmp_path, "torch", 2, "task.name=mine:Mine")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: the data is missing here (on rank 1, host ")
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
