"""Launchers that start workers again: the run goes on from its newest checkpoint by itself, though resume=never."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.bombed import BOMB
from tests.faults.kills import STEPS, same_model, uninterrupted, write_config
from tests.support.workers import BIN, run, unavailable, worker_environment

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

TRAIN = ["-m", "disttrain", "train", "config.yaml"]


def launch(folder: Path, command: list[str], bomb: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The launch, in which the bomb goes off in every worker of that rank that gets so far; and its summary."""
    write_config(folder, "top-k", resume="never")
    env = worker_environment(**{BOMB: json.dumps(bomb)})
    done = run([*command, f"output={folder}"], timeout=300, env=env, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (folder / "run.1").exists(), "the same run went on"
    return done, json.loads((folder / "run/summary.json").read_text())


def test_torchrun_restarts_workers_that_go_on_exactly(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    bomb = {"rank": 1, "where": "step", "count": 24, "delay": 0.002}  # two passes a step: each attempt makes 11
    done, summary = launch(tmp_path / "elastic", [*torchrun, *TRAIN, "engine=torch"], bomb)
    assert done.stderr.count("rank 1 (host ") >= 2, "it was killed twice"
    assert summary["world_size"] == 2
    last = f"run/checkpoints/step-{STEPS:08d}"
    assert same_model(tmp_path / "elastic" / last, uninterrupted(tmp_path / "whole", "top-k") / last)


def test_horovod_goes_on_with_the_workers_that_are_left(tmp_path: Path) -> None:
    """Two "hosts", of which one loses its worker."""
    if reason := unavailable("horovod-gloo"):
        pytest.skip(reason)
    discover = tmp_path / "discover.sh"
    discover.write_text("#!/bin/sh\necho localhost:1\necho 127.0.0.1:1\n")
    discover.chmod(0o755)
    command = [str(BIN / "horovodrun"), "--gloo", "-np", "2", "--min-np", "1", "--network-interface", "lo"]
    command += ["--host-discovery-script", str(discover), sys.executable, *TRAIN, "engine=horovod"]
    done, summary = launch(tmp_path / "elastic", command, {"rank": 1, "where": "step", "count": 20, "delay": 0.002})
    assert "rank 1 (host " in done.stdout + done.stderr
    assert "going on from" in done.stdout
    assert (summary["world_size"], summary["steps"], summary["ended_by"]) == (1, STEPS, "last_step")
