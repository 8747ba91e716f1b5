"""Links that fail, processes that stop, ranks that are slow: ridden out, or named and ended, as configured.

A rank that stays stopped, dies or does not come is in tests/distributed/test_liveness.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.network import ShapedNetwork, rank_environment
from tests.support.workers import ROOT, worker_environment

reason = ShapedNetwork.unavailable()
pytestmark = [pytest.mark.timeout(300), pytest.mark.netns, pytest.mark.skipif(reason is not None, reason=reason or "")]

# Every step appends a byte to the rank's file. Rank 1 takes longer for its steps than the others.
WORKER = """
import json, os, pathlib, sys, time
import torch
import disttrain
from disttrain.comm import Watch

path, options = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
with disttrain.init("torch", "cpu", watch=Watch(**options)) as comm:
    (path / f"pid-{comm.rank}").write_text(str(os.getpid()))
    model = torch.nn.Linear(64, 64)
    sgd = torch.optim.SGD(model.parameters(), lr=0.001)
    optimizer = disttrain.DistributedOptimizer(sgd, model, comm=comm, compressor={"name": "topk", "min_numel": 1})
    with open(path / f"steps-{comm.rank}", "ab", buffering=0) as steps:
        while True:
            comm.activity.enter("data loading")
            time.sleep(0.1 if comm.rank == 1 else 0.01)
            comm.activity.enter("forward and backward")
            optimizer.zero_grad()
            model(torch.ones(4, 64)).square().mean().backward()
            optimizer.step()
            steps.write(b".")
"""


class Job:
    """Three workers on three hosts."""

    def __init__(self, network: ShapedNetwork, path: Path, **watch: Any) -> None:
        self.network, self._path = network, path
        self._workers = []
        for rank, host in enumerate(network.hosts):
            place = rank_environment(rank, 3, master=network.hosts[0], port=29555, interface=network.interface)
            env = worker_environment(**place)
            with (path / f"stderr-{rank}").open("w") as stderr:
                command = [sys.executable, "-c", WORKER, str(path), json.dumps(watch)]
                self._workers.append(network.run(host, command, env, cwd=ROOT, stderr=stderr))
        self.wait_for(lambda: all(self.steps(rank) > 3 for rank in range(3)), "the workers did not start")

    def steps(self, rank: int) -> int:
        file = self._path / f"steps-{rank}"
        return file.stat().st_size if file.exists() else 0

    def pid(self, rank: int) -> int:
        return int((self._path / f"pid-{rank}").read_text())

    def errors(self, rank: int) -> str:
        return (self._path / f"stderr-{rank}").read_text()

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 100) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            report = [(worker.poll(), self.errors(rank)[-2000:]) for rank, worker in enumerate(self._workers)]
            assert time.monotonic() < deadline, f"{what}: {report}"
            assert [code for code, _ in report] == [None] * 3, f"{what}: {report}"
            time.sleep(0.05)

    def goes_on(self, what: str) -> None:
        """Every rank makes some more steps."""
        before = [self.steps(rank) for rank in range(3)]
        self.wait_for(lambda: all(self.steps(rank) > before[rank] + 3 for rank in range(3)), what)

    def ends(self) -> list[tuple[int, str]]:
        """By rank, exit code and the last line of stderr."""
        codes = [worker.wait(timeout=60) for worker in self._workers]
        return [(code, self.errors(rank).strip().splitlines()[-1]) for rank, code in enumerate(codes)]

    def name(self, rank: int) -> str:
        return rf"rank {rank} \(host w{rank}, pid {self.pid(rank)}\)"


def test_short_cuts_and_stops_are_ridden_out_a_straggler_is_named_and_a_long_cut_ends_all(tmp_path: Path) -> None:
    with ShapedNetwork(3, rate_mbit=None) as network:
        job = Job(network, tmp_path, silence_seconds=12, grace_seconds=1)
        network.cut("w2")
        time.sleep(1)
        stands = job.steps(0)
        time.sleep(4)
        assert job.steps(0) == stands, "the cut was none"
        network.mend("w2")
        job.goes_on("after a cut of 5 s")

        os.kill(job.pid(1), signal.SIGSTOP)
        time.sleep(3)
        os.kill(job.pid(1), signal.SIGCONT)
        job.goes_on("after a stop of 3 s")

        job.wait_for(lambda: "is slow" in job.errors(0), "no word of the slow rank")
        assert re.search(rf"warning: {job.name(1)} is slow: excluding waits, its steps take 0\.\d+ s, ", job.errors(0))
        assert "error" not in job.errors(0)

        network.cut("w2")
        results = job.ends()
        lost = "was lost: no heartbeat for 12 s; it was in step "
        assert [code for code, _ in results] == [13, 13, 13]
        for rank in (0, 1):
            line = next(line for line in job.errors(rank).splitlines() if line.startswith("error"))
            assert re.match(f"error: {job.name(2)} {lost}", line), line
            assert re.search(
                r"rank 0 is waiting in (all_reduce|all_gather) \d+ \((bucket \d: topk|.*)\) of step ", line
            ), line
        assert re.search(f"error: {job.name(0)} {lost}", job.errors(2))
