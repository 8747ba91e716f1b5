"""Start real worker processes under real launchers, with a time limit, and leave nothing behind."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

# A short run of real training. Its model and data import little, so that workers start soon.
CONFIG = """
task: {name: text, path: "package:sklearn/datasets/descr/*.rst", eval_windows: null, context: 32, width: 32, layers: 1}
seed: 3
batch_size: 64
max_steps: 50
optimizer: {name: sgd, lr: 0.1, momentum: 0.9}
schedule: {name: constant}
compressor: {name: dense}
evaluation: {every_epochs: null}
checkpoint: {every_epochs: null}
log_every: 1
"""


def _torchrun(world_size: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]


def _horovodrun(world_size: int) -> list[str]:
    return [_tool("horovodrun"), "--gloo", "-np", str(world_size), "-H", f"localhost:{world_size}", sys.executable]


def _mpirun(world_size: int) -> list[str]:
    command = [_tool("mpirun"), "-np", str(world_size), "--oversubscribe", "--bind-to", "none"]
    return [*command, "--mca", "btl", "self,vader", sys.executable]


def _tool(name: str) -> str:
    """A program of this Python environment, or else of the machine."""
    return str(BIN / name) if (BIN / name).exists() else name


# Each way to start workers: (command up to the script, engine, needed package, needed program).
LAUNCHERS: dict[str, tuple[Callable[[int], list[str]], str, str, str]] = {
    "torch": (_torchrun, "torch", "torch", "torchrun"),
    "horovod-gloo": (_horovodrun, "horovod", "horovod", "horovodrun"),
    "horovod-mpi": (_mpirun, "horovod", "horovod", "mpirun"),
    "mpi": (_mpirun, "mpi", "mpi4py", "mpirun"),
}


def unavailable(launcher: str) -> str | None:
    """Why this launcher cannot be used here, or None."""
    _, _, package, program = LAUNCHERS[launcher]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if shutil.which(_tool(program)) is None:
        return f"{program} is not installed"
    return None


def worker_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what an outer launcher set, ready for another one."""
    outer = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "HOROVOD_", "OMPI_", "PMI", "SLURM_", "TORCHELASTIC", "GLOO_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    env["PATH"] = f"{BIN}{os.pathsep}{env.get('PATH', '')}"
    paths = (ROOT, ROOT / "tests/support/quick_start")
    env.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(map(str, paths)), PYTHONUNBUFFERED="1")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return {**env, **extra}


def run(
    command: Sequence[str | Path], *, timeout: float, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a command; after ``timeout`` seconds it and all its descendants are killed and the test fails."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(env) if env is not None else worker_environment(),
        cwd=cwd,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        stdout, stderr = process.communicate()
        pytest.fail(f"{command} ran longer than {timeout} s\n{stdout[-3000:]}\n{stderr[-3000:]}")
    finally:
        kill_tree(process.pid)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants (torchrun and mpirun give workers sessions of their own)."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


_RANKS = ("HOROVOD_RANK", "RANK", "OMPI_COMM_WORLD_RANK")


def rank_of(process: psutil.Process) -> int | None:
    """The rank that its launcher gave it; None for what is no worker."""
    environ = process.environ()
    return next((int(environ[name]) for name in _RANKS if name in environ), None)


def processes_of(output: Path) -> list[psutil.Process]:
    """Workers, launchers and shells that run for this output directory, by their command lines."""
    mark, found = re.compile(rf"output={re.escape(str(output))}(?![\w/.-])"), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if mark.search(" ".join(process.cmdline())):
                found.append(process)
    return found


def train_records(directory: Path) -> list[dict[str, Any]]:
    """Of the steps that a run, perhaps one under way, has logged so far."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["kind"] == "train"]


def run_workers(
    launcher: str, world_size: int, script: Sequence[str | Path], *, timeout: float = 100, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run ``script`` (a file and its arguments) in ``world_size`` workers; skips the test where that cannot be."""
    reason = unavailable(launcher)
    if reason is not None:
        pytest.skip(reason)
    start, engine, _, _ = LAUNCHERS[launcher]
    return run([*start(world_size), *script], timeout=timeout, env=worker_environment(ENGINE=engine, **env))
