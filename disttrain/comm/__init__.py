"""Communication between ranks: one interface to all engines. ``init`` picks the engine that fits the launcher."""

from __future__ import annotations

import atexit

import torch

from disttrain.comm.base import Communicator
from disttrain.comm.engines import ENGINES
from disttrain.comm.engines.simulated import SimulatedCommunicator, SimulatedWorld, simulate
from disttrain.comm.engines.single import SingleProcess
from disttrain.comm.launch.environment import Environment, detect
from disttrain.comm.launch.horovod_elastic import request_rank
from disttrain.comm.liveness.guard import Guard
from disttrain.comm.liveness.watch import Watch
from disttrain.comm.malloc import keep_freed_memory
from disttrain.comm.work import Work
from disttrain.errors import UserError

__all__ = [
    "ENGINES",
    "Communicator",
    "Environment",
    "SimulatedCommunicator",
    "SimulatedWorld",
    "SingleProcess",
    "Watch",
    "Work",
    "detect",
    "init",
    "simulate",
]


def init(
    engine: str = "auto",
    device: str = "auto",
    timeout: float = 300.0,
    guard: bool = True,
    watch: Watch | None = None,
) -> Communicator:
    """Join the other workers that the launcher started.

    Use the communicator as a context manager, or call ``close`` at the end. When a rank fails or is lost, the other
    ranks end within seconds, with an error that names it. On the CPU, the process keeps the memory that it frees (see
    ``comm.malloc``).

    Args:
        engine: one of ``ENGINES``, or ``auto`` for the engine that fits the launcher (torchrun, horovodrun, mpirun,
            srun). Without a launcher, ``auto`` means a single process.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU if there is one. ``cuda`` means the GPU of this local rank.
        timeout: seconds to wait here for the other workers. Later collectives of torch.distributed time out after the
            longer of this and the time for which ``watch`` lets ranks wait.
        guard: whether to watch the other ranks. Without a guard, the engine and the launcher decide what happens when
            a rank dies.
        watch: settings of the guard. Default: ``Watch()``.

    Raises:
        UserError: the engine is unknown, is not installed, or does not fit the launcher's variables; or the device is
            unknown or not available.
    """
    if engine not in (*ENGINES, "auto"):
        raise UserError(f"unknown engine {engine!r}: choose from auto, {', '.join(ENGINES)}")
    request_rank()
    environment = detect()
    if engine == "auto":
        engine = environment.engine
        # Some clusters start every srun with an MPI plug-in. Without mpi4py, gloo or nccl still works.
        if not ENGINES[engine].is_installed and environment.master_addr is not None:
            engine = "torch"
    row = ENGINES[engine]
    if not row.is_installed:
        raise UserError(f"engine {engine!r} needs the package {row.package}, which is not installed: run {row.install}")
    if engine == "single" and environment.world_size > 1:
        raise UserError(
            f"{environment.launcher} started {environment.world_size} workers; with engine 'single' each would train a "
            "separate model: use engine=auto, or start one process"
        )
    chosen = _choose_device(device, environment)
    if chosen.type == "cpu":
        keep_freed_memory()
    watch = watch or Watch()
    patience = max(timeout, watch.patience) if guard else timeout
    comm = row.load().join(environment, chosen, timeout=timeout, patience=patience)
    atexit.register(comm.close_at_exit)
    if guard and comm.world_size > 1:
        comm.guard = Guard(
            comm,
            silence=watch.silence_seconds,
            grace=watch.grace_seconds,
            activity=comm.activity,
            stall=watch.stall_seconds,
            end_on_stall=watch.on_stall == "end",
            straggler_factor=watch.straggler_factor,
            late=watch.late_seconds,
        )
    return comm


def _choose_device(device: str, environment: Environment) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device {device!r}: choose from auto, cpu, cuda")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError(
            "device 'cuda' was requested, but torch finds no usable GPU: use device=cpu, or install the GPU's driver"
        )
    if device == "cpu" or not available:
        return torch.device("cpu")
    chosen = torch.device("cuda", environment.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(chosen)
    return chosen
