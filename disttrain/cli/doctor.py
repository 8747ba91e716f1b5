"""``disttrain doctor``: which engines, launchers, GPUs and interfaces a machine has, and how fast they are."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from rich.console import Console
from rich.table import Table

from disttrain.collectives import AllGather, AllReduce, Collective
from disttrain.comm import ENGINES, Communicator, detect, init
from disttrain.comm.launch.environment import Environment

NUMBA_COMMAND = "pip install numba"
_IMPORT_SECONDS = 120.0
_SMALL, _LARGE = 1, 4 * 2**20  # float32 elements: 4 B and 16 MiB
_REPEATS = {_SMALL: 50, _LARGE: 7}

# Run in separate processes: a library built for another torch or MPI may crash the process that imports it.
_HOROVOD = """
import json, horovod, horovod.torch as hvd
built = {"Gloo": hvd.gloo_built(), "MPI": hvd.mpi_built(), "NCCL": hvd.nccl_built()}
print(json.dumps([horovod.__version__, "built with " + ", ".join(name for name, there in built.items() if there)]))
"""
_MPI = """
import json, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(json.dumps([mpi4py.__version__, MPI.Get_library_version().split(",")[0].split(chr(10))[0].strip(chr(0))]))
"""
_NUMBA = """
import json, numba
from disttrain.kernels.cpu.compiling import report
print(json.dumps([numba.__version__, report()]))
"""


@dataclass(frozen=True)
class Finding:
    """A row of a table. ``state`` is ready, missing or broken; ``note`` says what it was built with, or what to do."""

    name: str
    state: str
    version: str = ""
    note: str = ""


def run(probe: bool) -> int:
    """Print what was found and, with ``probe``, what was measured; on rank 0. Return the exit code.

    Raises:
        UserError: the launcher's environment variables are contradictory, or its engine cannot start.
    """
    environment = detect()
    console = Console(quiet=environment.rank != 0)
    if environment.rank == 0:
        for table in (_machine(), _engines(), _kernels(), _launchers(), _interfaces(), _environment(environment)):
            console.print(table)
    if not probe:
        return 0
    if environment.world_size == 1:
        console.print(
            "There is nothing to measure with one process: start the probe under a launcher, "
            "for example [bold]torchrun --standalone --nproc-per-node 2 -m disttrain doctor --probe[/]"
        )
        return 0
    with init() as comm:
        console.print(_measurements(comm))
    return 0


def examine_engines() -> list[Finding]:
    """Return a finding for each engine, after importing its package if it is installed."""
    gloo, nccl = torch.distributed.is_gloo_available(), torch.distributed.is_nccl_available()
    parts = [name for name, there in (("gloo", gloo), ("nccl", nccl)) if there]
    pending = [_import(name, code, ENGINES[name].install) for name, code in (("horovod", _HOROVOD), ("mpi", _MPI))]
    return [
        Finding("single", "ready", "", "one process"),
        Finding("torch", "ready" if gloo else "broken", torch.__version__, "built with " + ", ".join(parts)),
        *[finish() for finish in pending],
    ]


def examine_kernels() -> list[Finding]:
    """Return a finding for the compiler of the CPU kernels, and whether it can cache them on disk."""
    return [_import("numba", _NUMBA, NUMBA_COMMAND)()]


def examine_launchers() -> list[Finding]:
    """Return a finding for each launcher's program on PATH."""
    commands = {
        "torchrun": "comes with torch",
        "horovodrun": ENGINES["horovod"].install,
        "mpirun": ENGINES["mpi"].install,
        "srun": "on clusters with Slurm",
    }
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    return [_examine_launcher(name, shutil.which(name, path=path), command) for name, command in commands.items()]


def seconds(comm: Communicator, collective: Callable[[torch.Tensor], Collective], numel: int) -> float:
    """Return the median time of a collective over ``numel`` float32, on the slowest rank. A collective."""
    tensor = torch.ones(numel, device=comm.device)
    times = []
    for _ in range(_REPEATS.get(numel, 5) + 1):
        comm.barrier()
        started = time.perf_counter()
        comm.start(collective(tensor)).wait()
        if comm.device.type == "cuda":
            torch.cuda.synchronize(comm.device)
        times.append(time.perf_counter() - started)
    median = statistics.median(times[1:])  # the first call opens connections
    return float(comm.all_reduce(torch.tensor(median, dtype=torch.float64), op="max"))


def _measurements(comm: Communicator) -> Table:
    table = _table(
        f"Probe: {comm.world_size} workers on {comm.engine}, {comm.device.type}",
        "collective",
        "latency (4 B)",
        "16 MiB per rank",
        "wire rate per rank",
    )
    share = (comm.world_size - 1) / comm.world_size
    size = _LARGE * 4
    # Bytes that a ring sends over each rank's link, to compare with the link's bandwidth.
    probes: dict[str, tuple[Callable[[torch.Tensor], Collective], float]] = {
        "all-reduce": (lambda tensor: AllReduce(tensor, op="sum"), 2 * share * size),
        "all-gather": (lambda tensor: AllGather(tensor, same_size=True), (comm.world_size - 1) * size),
    }
    for name, (collective, num_bytes) in probes.items():
        small, large = seconds(comm, collective, _SMALL), seconds(comm, collective, _LARGE)
        rate = num_bytes / large
        table.add_row(name, f"{small * 1e6:.0f} us", f"{large * 1e3:.1f} ms", f"{rate * 8e-9:.2f} Gbit/s")
    return table


def _import(name: str, code: str, command: str) -> Callable[[], Finding]:
    """Start importing a package, and return a function that waits for the finding."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish() -> Finding:
        try:
            output, errors = process.communicate(timeout=_IMPORT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return Finding(name, "broken", "", f"importing it took over {_IMPORT_SECONDS:.0f} s; reinstall: {command}")
        if process.returncode == 0:
            version, note = json.loads(output.splitlines()[-1])
            return Finding(name, "ready", version, note)
        reason = errors.strip().splitlines()[-1] if errors.strip() else f"exit code {process.returncode}"
        if reason.startswith("ModuleNotFoundError"):
            return Finding(name, "missing", "", command)
        return Finding(name, "broken", "", f"{reason}; reinstall: {command}")

    return finish


def _examine_launcher(name: str, path: str | None, command: str) -> Finding:
    if path is None:
        return Finding(name, "missing", "", command)
    if name in ("torchrun", "horovodrun"):  # --version would import torch, and the engine's version is known
        return Finding(name, "ready", "", path)
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, "broken", "", f"{path}: {error}")
    if answer.returncode != 0:
        return Finding(name, "broken", "", f"{path}: {(answer.stderr.strip().splitlines() or ['it fails'])[-1]}")
    return Finding(name, "ready", next((word for word in answer.stdout.split() if word[:1].isdigit()), ""), path)


def _machine() -> Table:
    table = _table("Machine", "", "", show_header=False)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    physical = psutil.cpu_count(logical=False)
    table.add_row("host", f"{socket.gethostname()} ({platform.platform()})")
    table.add_row("Python", platform.python_version())
    table.add_row("cores", f"{usable} usable, {physical or '?'} physical, {os.cpu_count()} logical")
    table.add_row("memory", f"{psutil.virtual_memory().total / 2**30:.0f} GiB")
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    for index, gpu in enumerate(gpus):
        table.add_row(f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    if not gpus:
        cuda = torch.version.cuda
        table.add_row("GPUs", "none" + ("" if cuda else " (this torch is built without CUDA)"))
    return table


def _engines() -> Table:
    return _findings("Engines", examine_engines())


def _kernels() -> Table:
    return _findings("Kernels", examine_kernels())


def _launchers() -> Table:
    return _findings("Launchers", examine_launchers())


def _findings(title: str, findings: list[Finding]) -> Table:
    table = _table(title, "name", "state", "version", "notes, or how to install it")
    colors = {"ready": "green", "missing": "yellow", "broken": "red"}
    for finding in findings:
        color = colors[finding.state]
        table.add_row(finding.name, f"[{color}]{finding.state}[/]", finding.version, finding.note.replace("[", r"\["))
    return table


def _interfaces() -> Table:
    table = _table("Interfaces", "name", "state", "rate", "addresses")
    states = psutil.net_if_stats()
    for name, entries in sorted(psutil.net_if_addrs().items()):
        addresses = [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        state = states.get(name)
        rate = f"{state.speed / 1000:g} Gbit/s" if state and state.speed else ""
        table.add_row(name, "up" if state and state.isup else "down", rate, "\n".join(addresses))
    return table


def _environment(environment: Environment) -> Table:
    table = _table("This process", "", "", show_header=False)
    table.add_row("started by", environment.launcher if environment.launcher != "none" else "no launcher")
    table.add_row("default engine", environment.engine)
    table.add_row("rank", f"{environment.rank} of {environment.world_size}")
    table.add_row("on this host", f"{environment.local_rank} of {environment.local_size}")
    if environment.num_hosts is not None:
        table.add_row("hosts", str(environment.num_hosts))
    if environment.master_addr is not None:
        table.add_row("rendezvous", f"{environment.master_addr}:{environment.master_port}")
    return table


def _table(title: str, *columns: str, show_header: bool = True) -> Table:
    table = Table(title=title, title_justify="left", show_header=show_header)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
