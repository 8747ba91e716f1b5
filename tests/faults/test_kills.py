"""A few of the kills of ``make faults``, one run on each engine, and launchers that start workers again themselves."""

from __future__ import annotations

import functools
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from disttrain.comm import simulate
from tests.faults.bombed import BOMB
from tests.faults.kills import ENGINES, STEPS, Chain, Report, same_model, table, uninterrupted, write_config
from tests.support.runs import make_config, train
from tests.support.workers import BIN, run, unavailable, worker_environment


@functools.cache
def whole(folder: Path) -> Path:
    return uninterrupted(folder / "whole", "top-k")


@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("engine", "seed"), [*zip(ENGINES, (3, 2, 1), strict=True)])
def test_a_killed_run_resumes_as_if_nothing_had_happened(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, engine: str, seed: int
) -> None:
    if reason := unavailable(engine):
        pytest.skip(reason)
    report = Report()
    Chain(tmp_path / "chain", engine, "top-k", whole(tmp_path_factory.getbasetemp()), random.Random(seed)).go(1, report)
    assert report.wrong == []
    assert report.num_ended == 1
    assert [kill.where for kill in report.kills][1:] == ["end"], "the seed is to be one that kills"
    assert f"| {engine} | 1 |" in table(report, seed)


TRAIN = ["-m", "disttrain", "train", "config.yaml"]


def launch(folder: Path, command: list[str], bomb: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The launch, in which the bomb goes off in every worker of that rank that gets so far; and its summary.

    The run resumes from its newest checkpoint, although resume=never.
    """
    write_config(folder, "top-k", resume="never")
    env = worker_environment(**{BOMB: json.dumps(bomb)})
    done = run([*command, f"output={folder}"], timeout=300, env=env, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (folder / "run.1").exists(), "the same run went on"
    return done, json.loads((folder / "run/summary.json").read_text())


@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_torchrun_restarts_workers_that_resume_exactly(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    bomb = {"rank": 1, "where": "step", "count": 24, "delay": 0.002}  # two passes a step: each attempt makes 11
    done, summary = launch(tmp_path / "elastic", [*torchrun, *TRAIN, "engine=torch"], bomb)
    assert done.stderr.count("rank 1 (host ") >= 2, "it was killed twice"
    assert summary["world_size"] == 2
    last = f"run/checkpoints/step-{STEPS:08d}"
    assert same_model(tmp_path / "elastic" / last, whole(tmp_path_factory.getbasetemp()) / last)


@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_horovod_continues_with_the_remaining_workers(tmp_path: Path) -> None:
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
    assert "resuming from" in done.stdout
    assert (summary["world_size"], summary["steps"], summary["ended_by"]) == (1, STEPS, "last_step")


@pytest.mark.usefixtures("one_thread")
def test_a_checkpoint_that_verifies_and_is_wrong_is_seen(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "chain", "torch", "top-k", tmp_path / "whole", random.Random(0))
    for folder, seed in ((chain.folder, 0), (chain.expected, 1)):
        config = make_config(folder, name="run", seed=seed, max_steps=2, checkpoint={"every_steps": 1})
        simulate(2, lambda comm, config=config: train(config, comm))
    assert len([*chain.wrongs()]) == 2
    shutil.rmtree(chain.expected)
    shutil.copytree(chain.folder, chain.expected)
    assert [*chain.wrongs()] == []
    (chain.folder / "run/checkpoints/step-00000002/model.safetensors").write_bytes(b"broken")
    assert [*chain.wrongs()] == [], "broken, and known to be"


def test_moments_are_those_of_the_seed(tmp_path: Path) -> None:
    one, other = (Chain(tmp_path / name, "torch", "fp16", tmp_path, random.Random(5)) for name in "ab")
    assert [one.bomb() for _ in range(20)] == [other.bomb() for _ in range(20)]
    assert {one.bomb()["where"] for _ in range(50)} == {"start", "step", "evaluation", "checkpoint"}
