"""Every launch script for real: one result on all, lost workers named, nothing left running, bad input in one line."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from disttrain.errors import INTERRUPTED_EXIT_CODE
from disttrain.training.checkpoints import folder as checkpoint_folder
from tests.lab.hosts import Hosts, hosts, why_not
from tests.support.workers import (
    BIN,
    CONFIG,
    ROOT,
    kill_tree,
    processes_of,
    rank_of,
    run,
    train_records,
    worker_environment,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

# Arguments that choose each launcher, what must be installed for it, and the engine it ends up on.
LAUNCHERS: dict[str, tuple[list[str], list[str], str]] = {
    "local": (["local.sh", "-n", "2"], [], "torch"),
    "torchrun": (["torchrun.sh", "-H", "localhost:2"], [], "torch"),
    "horovod-gloo": (["horovod.sh", "-n", "2", "--gloo"], ["horovod", "horovodrun"], "horovod"),
    "horovod-mpi": (["horovod.sh", "-n", "2", "--mpi"], ["horovod", "mpirun"], "horovod"),
    "mpi": (["mpi.sh", "-n", "2"], ["mpi4py", "mpirun"], "mpi"),
    "mpi-horovod": (["mpi.sh", "-n", "2", "engine=horovod"], ["horovod", "mpirun"], "horovod"),
}
# Not MPI: Open MPI's TCP connections between two host names that share one network stack hang at times.
OVER_HOSTS: dict[str, tuple[list[str], list[str], str]] = {
    "torchrun-hosts": (["torchrun.sh", "-H", "h1:1,h2:1"], [], "torch"),
    "horovod-gloo-hosts": (["horovod.sh", "-H", "h1:1,h2:1"], ["horovod", "horovodrun"], "horovod"),
}
launchers = pytest.mark.parametrize("launcher", LAUNCHERS)
over_hosts = pytest.mark.parametrize("launcher", OVER_HOSTS)


def command(launcher: str, config: Path, *overrides: str) -> list[str]:
    (script, *arguments), needed, _ = (LAUNCHERS | OVER_HOSTS)[launcher]
    for name in needed:
        there = shutil.which(name, path=f"{BIN}:{os.environ['PATH']}") or importlib.util.find_spec(name.split(".")[0])
        if not there:
            pytest.skip(f"{name} is not installed")
    return [str(ROOT / "launch" / script), str(config), *arguments, *overrides]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def losses(directory: Path) -> list[float]:
    return [record["loss"] for record in train_records(directory)]


@pytest.fixture(scope="module")
def losses_of_one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    directory = tmp_path_factory.mktemp("single")
    (directory / "single.yaml").write_text(CONFIG)
    arguments = ["train", directory / "single.yaml", "engine=single", "name=single", f"output={directory}"]
    done = run([sys.executable, "-m", "disttrain", *arguments], timeout=120)
    assert done.returncode == 0, done.stderr
    return losses(directory / "single")


class Running:
    """A launch in the middle of a long run. Its processes are known by the output directory in their command lines."""

    def __init__(self, arguments: list[str], directory: Path) -> None:
        self.directory, self.output = directory, directory / "output"
        with self.output.open("w") as stream:
            options = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": stream, "start_new_session": True}
            self.launcher = subprocess.Popen(arguments, cwd=directory, env=worker_environment(), **options)

    def losses(self, num_steps: int) -> list[float]:
        """Those of the first steps, once they have been made."""
        deadline = time.monotonic() + 240
        while len(made := losses(self.directory / "long")) < num_steps:
            assert self.launcher.poll() is None, self.text
            assert time.monotonic() < deadline, f"only {len(made)} steps were made\n{self.text}"
            time.sleep(0.1)
        return made[:num_steps]

    @property
    def text(self) -> str:
        return self.output.read_text()

    def processes(self) -> list[psutil.Process]:
        return processes_of(self.directory)

    def worker(self, rank: int) -> psutil.Process:
        for process in self.processes():
            if rank_of(process) == rank:
                return process
        raise AssertionError(f"no worker of rank {rank}\n{self.text}")

    def wait(self, timeout: float) -> int:
        try:
            return self.launcher.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout} s\n{self.text}")

    def check_ends_saved(self) -> None:
        """With the code for it, and nothing left; the run says after which step, and its checkpoint is whole."""
        assert self.wait(60) == INTERRUPTED_EXIT_CODE, self.text
        assert self.leftovers() == []
        found = re.search(r"interrupted after step (\d+) by SIG(TERM|INT|USR1) on rank \d", self.text)
        assert found, self.text
        (checkpoint,) = (self.directory / "long/checkpoints").iterdir()
        assert checkpoint_folder.verified(checkpoint).manifest.step == int(found[1])
        assert json.loads((self.directory / "long/summary.json").read_text())["ended_by"] == "interrupted"

    def leftovers(self) -> list[psutil.Process]:
        return psutil.wait_procs(self.processes(), timeout=10)[1]


@pytest.fixture
def start_long_run(config, tmp_path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(launcher: str, lab: Hosts | None = None) -> Running:
        arguments = command(
            launcher, config, "name=long", f"output={tmp_path}", "max_steps=1000000", "checkpoint.every_epochs=1000000"
        )
        started.append(Running(lab.command(*arguments) if lab else arguments, tmp_path))
        started[-1].losses(3)
        return started[-1]

    yield start
    for running in started:
        kill_tree(running.launcher.pid)
        for process in running.processes():
            process.kill()


# Rank 0 is where the others' watch meets. ``local`` is torchrun too, ``mpi-horovod`` the engine of ``horovod-mpi``.
KILLED = [("local", 1), ("horovod-gloo", 1), ("horovod-mpi", 1), ("mpi", 0)]


@pytest.mark.parametrize(("launcher", "victim"), KILLED)
def test_killed_worker_ends_the_run_and_is_named(launcher, victim, start_long_run):
    running = start_long_run(launcher)
    worker = running.worker(victim)
    worker.kill()
    assert running.wait(60) not in (0, 2)
    assert re.search(rf"error: rank {victim} \(host \S+, pid {worker.pid}\) was lost", running.text), running.text
    assert running.leftovers() == []


@launchers
def test_two_workers_train_as_one_process_does_until_they_are_told_to_end(
    launcher, start_long_run, losses_of_one_process
):
    running = start_long_run(launcher)
    assert running.losses(50) == pytest.approx(losses_of_one_process, abs=1e-5)
    running.launcher.terminate()
    running.check_ends_saved()


def test_control_c_ends_the_run_in_good_order(start_long_run):
    running = start_long_run("local")
    os.killpg(running.launcher.pid, signal.SIGINT)  # a terminal sends it to the whole foreground group
    running.check_ends_saved()


@pytest.fixture(scope="module")
def lab() -> Iterator[Hosts]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with hosts() as lab:
        yield lab


@over_hosts
def test_two_hosts_train_as_one_process_does_and_leave_no_orphan(launcher, lab, start_long_run, losses_of_one_process):
    running = start_long_run(launcher, lab)
    assert running.losses(50) == pytest.approx(losses_of_one_process, abs=1e-5)
    hostnames = {running.worker(rank).environ().get("SSH_CONNECTION", "here") for rank in range(2)}
    assert len(hostnames) == 2
    running.launcher.terminate()
    running.check_ends_saved()


@pytest.mark.parametrize("script", ["local.sh", "torchrun.sh", "horovod.sh", "mpi.sh"])
def test_bad_config_is_one_line_before_any_worker_starts(script, config):
    done = run([ROOT / "launch" / script, config, "-n", "3", "optimizer.lr=0.1"], timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: batch_size=64 .*3.*\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local.sh", [], "no config file given; usage: launch/local.sh CONFIG"),
        ("local.sh", ["a.yaml", "b.yaml"], "more than one config file: 'a.yaml' and 'b.yaml'"),
        ("local.sh", ["a.yaml", "-n", "0"], "-n 0: the number of workers must be an integer, 1 or more"),
        ("local.sh", ["a.yaml", "-n"], "-n needs a value"),
        ("local.sh", ["a.yaml", "--nodes", "2"], "unknown option --nodes"),
        ("local.sh", ["a.yaml", "-H", "a:1"], "use torchrun.sh for hosts"),
        ("mpi.sh", ["a.yaml", "-H", "a:b"], "host 'a:b' must have the form host:slots"),
        ("mpi.sh", ["a.yaml", "--hostfile", "/nowhere"], "cannot read host file /nowhere"),
        ("horovod.sh", ["a.yaml", "--gloo", "--mpi"], "--gloo and --mpi exclude each other"),
        ("torchrun.sh", ["a.yaml", "-H", "a:2,b:2", "-n", "3"], "-n 3 contradicts the slots"),
        ("torchrun.sh", ["a.yaml", "-H", "localhost:2,b:2"], "cannot reach rank 0 as 'localhost'"),
        ("local.sh", ["nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_arguments_are_one_line(script, arguments, message):
    if script == "horovod.sh" and not (BIN / "horovodrun").exists():
        pytest.skip("horovodrun is not installed")
    done = run([ROOT / "launch" / script, *arguments], timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", done.stderr), done.stderr


@pytest.mark.parametrize(("script", "program"), [("horovod.sh", "horovodrun"), ("mpi.sh", "mpirun")])
def test_missing_launcher_comes_with_what_installs_it(script, program, config, tmp_path):
    for name in ("bash", "dirname", "id", "env"):
        (tmp_path / name).symlink_to(shutil.which(name))
    environ = {**worker_environment(), "PATH": str(tmp_path), "VIRTUAL_ENV": str(tmp_path)}
    done = run([ROOT / "launch" / script, config], timeout=60, env=environ)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: {program} is not installed: .*install.*\n", done.stderr), done.stderr


def test_host_file_and_options_reach_the_launcher(config, tmp_path):
    """A stand-in for mpirun shows what it is started with."""
    script = '[ "$1" = --version ] && echo "mpirun (Open MPI) 4" || echo "mpirun $*"'
    (tmp_path / "mpirun").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "mpirun").chmod(0o755)
    hosts = tmp_path / "hosts"
    hosts.write_text("# the lab\nnode-a slots=2\nnode-b:1\n\nnode-c   # one\n")
    settings = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_IB_HCA": "mlx5", "DISTTRAIN_NODE_SIZE": "2", "OMP_PROC_BIND": "true"}
    left_over = {"HOROVOD_LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    environ = {**worker_environment(), "VIRTUAL_ENV": str(BIN.parent), **settings, **left_over}
    environ["PATH"] = f"{tmp_path}:{environ['PATH']}"
    arguments = ["--hostfile", hosts, "seed=4", "--", "--mca", "btl", "tcp,self"]
    done = run([ROOT / "launch" / "mpi.sh", config, *arguments], timeout=60, env=environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mpirun -n 4 ")
    assert " -H node-a:2,node-b:1,node-c " in done.stdout
    for name in (*settings, "PATH", "PYTHONPATH"):
        assert f" -x {name} " in done.stdout
    for name in left_over:
        assert f" -x {name} " not in done.stdout
    assert re.search(rf"--mca btl tcp,self \S+ -m disttrain train {config} engine=mpi seed=4\n", done.stdout)
