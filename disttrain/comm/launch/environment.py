"""Which launcher started this process, and what it says about ranks: one table, read from environment variables.

Nothing here talks to the network or imports an engine, so it can be called before anything else and tested with
recorded environments.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from disttrain.errors import UserError

DEFAULT_PORT = 29500
_LOCALHOST = ("127.0.0.1", "localhost", "::1")
# Slurm numbers the steps that are not srun's (batch script, interactive shell, ...) from the top of 32 bits.
_FIRST_SPECIAL_STEP = 0xFFFF_FFF0


@dataclass(frozen=True)
class Environment:
    """What the launcher told this process.

    ``engine`` is the engine that fits the launcher; another may be asked for. ``num_hosts`` and the address to meet at
    are None where the launcher does not say (MPI over several hosts needs no address, for example).
    """

    launcher: str
    engine: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    num_hosts: int | None = None
    master_addr: str | None = None
    master_port: int | None = None

    def rendezvous(self) -> tuple[str, int]:
        """The address and port where rank 0 listens, for an engine that needs one (torch).

        Raises UserError when the launcher does not tell and the ranks are on several hosts.
        """
        if self.master_addr is None or self.master_port is None:
            raise UserError(
                f"{self.launcher} does not say where rank 0 runs: export MASTER_ADDR (the host of rank 0, as the other "
                "hosts reach it) and MASTER_PORT on every host, or choose the engine that fits the launcher"
            )
        return self.master_addr, self.master_port


@dataclass(frozen=True)
class Launcher:
    """One row of the table: the names of a launcher's variables.

    ``world_size`` may list alternatives, the first that is set counts. ``local_size`` is a name, or a function of the
    variables for a launcher that writes it in a form of its own. ``when`` narrows a row that another one would share.
    """

    name: str
    engine: str
    rank: str
    world_size: tuple[str, ...]
    local_rank: str
    local_size: str | Callable[[Mapping[str, str]], int]
    num_hosts: tuple[str, ...] = ()
    when: Callable[[Mapping[str, str]], bool] = lambda environ: True


def detect(environ: Mapping[str, str] = os.environ) -> Environment:
    """Read the launcher's variables. No launcher: one process, engine ``single``.

    Raises UserError, naming the variable, where the variables contradict each other or are not numbers.
    """
    environ = {name: value for name, value in environ.items() if value.strip()}  # an empty variable is an unset one
    launcher = _started_by(environ)
    if launcher is None:
        return Environment("none", "single", num_hosts=1)

    world_size_name = _first_set(environ, launcher.world_size, needed_by=launcher)
    world_size = _number(environ, world_size_name, minimum=1)
    rank = _number(environ, launcher.rank)
    if rank >= world_size:
        raise UserError(f"{launcher.rank}={rank} must be below {world_size_name}={world_size}")
    local_rank, local_size = _local(environ, launcher, rank, world_size)
    if local_rank >= local_size:
        raise UserError(f"{launcher.local_rank}={local_rank} must be below the {local_size} workers of this host")
    if local_size > world_size:
        raise UserError(f"{local_size} workers on this host cannot be: {world_size_name}={world_size} in all")

    num_hosts = 1 if local_size == world_size else None
    if num_hosts is None and any(name in environ for name in launcher.num_hosts):
        num_hosts = _number(environ, _first_set(environ, launcher.num_hosts, needed_by=launcher), minimum=1)
    master_addr, master_port = _master(environ, launcher, num_hosts)
    # One task of srun has nobody to meet, so it needs no engine (a shell opened by `srun --pty` is such a task).
    engine = "single" if launcher.name.startswith("srun") and world_size == 1 else launcher.engine
    return Environment(
        launcher.name, engine, rank, world_size, local_rank, local_size, num_hosts, master_addr, master_port
    )


def _started_by(environ: Mapping[str, str]) -> Launcher | None:
    """The launcher whose variables are to be believed."""
    present = [row for row in LAUNCHERS if row.rank in environ and row.when(environ)]
    if present[:1] == [_TORCHRUN] and "TORCHELASTIC_RUN_ID" not in environ and present[1:]:
        return _by_hand_or(present[1], environ)
    return present[0] if present else None


def _by_hand_or(launcher: Launcher, environ: Mapping[str, str]) -> Launcher:
    """RANK and WORLD_SIZE, but not by torchrun, in a process of another launcher's: which of the two to believe.

    They are a script's own (what the launcher started has started workers itself, or has named the ranks again), or are
    left over from a pod (Kubernetes sets RANK=0 and WORLD_SIZE=1), an image or a profile.
    """
    if "WORLD_SIZE" not in environ:
        return launcher
    size_name = _first_set(environ, launcher.world_size, needed_by=launcher)
    size, by_hand = _number(environ, size_name, minimum=1), _number(environ, "WORLD_SIZE", minimum=1)
    if size == 1 or by_hand > size:
        return _TORCHRUN
    if by_hand == 1:
        return launcher
    if by_hand == size and _number(environ, "RANK") == _number(environ, launcher.rank):
        return _TORCHRUN
    raise UserError(
        f"RANK={environ['RANK']} and WORLD_SIZE={by_hand} contradict {launcher.name}, which says {launcher.rank}="
        f"{environ[launcher.rank]} and {size_name}={size}: unset RANK and WORLD_SIZE if they are left over from "
        f"elsewhere, or else unset {launcher.rank}"
    )


def slurm_tasks_per_node(environ: Mapping[str, str]) -> int:
    """The number of tasks of the step on this node, from a list such as ``2(x3),1`` and the node's index."""
    name = _first_set(environ, ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    counts: list[int] = []
    for part in environ[name].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UserError(f"{name}={environ[name]!r} is not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    if node >= len(counts):
        raise UserError(f"SLURM_NODEID={node} is beyond the {len(counts)} nodes of {name}={environ[name]!r}")
    return counts[node]


def first_slurm_host(node_list: str) -> str:
    """The first host of Slurm's compressed list: ``gpu[003-007,9],login1`` -> ``gpu003``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list.strip())
    if first is None:
        raise UserError(f"cannot read Slurm's node list {node_list!r}: export MASTER_ADDR")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _in_srun_step(environ: Mapping[str, str]) -> bool:
    # A batch script's body has SLURM_PROCID=0 and SLURM_NTASKS=<the whole job's> too, but it is one process that
    # nobody will join; only srun's own steps carry an ordinary step id.
    return "SLURM_STEP_ID" in environ and _number(environ, "SLURM_STEP_ID") < _FIRST_SPECIAL_STEP


def _by_horovodrun(environ: Mapping[str, str]) -> bool:
    # `horovodrun --mpi` sets no variable of its own, but gives mpirun these flags, all of them.
    flags = {"orte_tag_output": "1", "pml": "ob1", "btl": "^openib", "rmaps_base_mapping_policy": "slot"}
    return all(environ.get(f"OMPI_MCA_{name}") == value for name, value in flags.items())


def _srun_row(name: str, engine: str, variable: str) -> Launcher:
    return Launcher(
        name=name,
        engine=engine,
        rank="SLURM_PROCID",
        world_size=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        local_rank="SLURM_LOCALID",
        local_size=slurm_tasks_per_node,
        num_hosts=("SLURM_STEP_NUM_NODES", "SLURM_NNODES"),
        when=lambda environ: variable in environ and _in_srun_step(environ),
    )


_TORCHRUN = Launcher(
    name="torchrun",
    engine="torch",
    rank="RANK",
    world_size=("WORLD_SIZE",),
    local_rank="LOCAL_RANK",
    local_size="LOCAL_WORLD_SIZE",
    num_hosts=("GROUP_WORLD_SIZE",),
)
_OPEN_MPI = Launcher(
    name="mpirun (Open MPI)",
    engine="mpi",
    rank="OMPI_COMM_WORLD_RANK",
    world_size=("OMPI_COMM_WORLD_SIZE",),
    local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
    local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
)

# The order decides where one launcher starts another: the inner one's variables are the ones to believe. Slurm comes
# last, as mpirun, horovodrun and torchrun all run inside its jobs and inherit its variables.
LAUNCHERS = (
    Launcher(
        name="horovodrun",
        engine="horovod",
        rank="HOROVOD_RANK",
        world_size=("HOROVOD_SIZE",),
        local_rank="HOROVOD_LOCAL_RANK",
        local_size="HOROVOD_LOCAL_SIZE",
        num_hosts=("HOROVOD_CROSS_SIZE",),
    ),
    _TORCHRUN,
    replace(_OPEN_MPI, name="horovodrun --mpi", engine="horovod", when=_by_horovodrun),
    _OPEN_MPI,
    Launcher(
        name="mpiexec (MPICH)",
        engine="mpi",
        rank="PMI_RANK",
        world_size=("PMI_SIZE",),
        local_rank="MPI_LOCALRANKID",
        local_size="MPI_LOCALNRANKS",
        # `srun --mpi=pmi2` sets PMI_RANK as well; Hydra alone sets MPI_LOCALRANKID, also where it starts through srun.
        when=lambda environ: "MPI_LOCALRANKID" in environ or not _in_srun_step(environ),
    ),
    _srun_row("srun --mpi=pmix", "mpi", "PMIX_RANK"),
    _srun_row("srun --mpi=pmi2", "mpi", "PMI_RANK"),
    _srun_row("srun", "torch", "SLURM_PROCID"),
)


def _local(environ: Mapping[str, str], launcher: Launcher, rank: int, world_size: int) -> tuple[int, int]:
    """(local_rank, local_size)."""
    if callable(launcher.local_size):
        return _number(environ, launcher.local_rank), launcher.local_size(environ)
    names = (launcher.local_rank, launcher.local_size)
    missing = [name for name in names if name not in environ]
    if not missing:
        return _number(environ, names[0]), _number(environ, names[1], minimum=1)
    if len(missing) == 1:
        raise UserError(f"{missing[0]} is not set though {launcher.rank} is: set {' and '.join(names)}, or neither")
    # Ranks exported by hand: all on this host if they meet on it, else one a host.
    return (rank, world_size) if environ.get("MASTER_ADDR") in _LOCALHOST else (0, 1)


def _master(environ: Mapping[str, str], launcher: Launcher, num_hosts: int | None) -> tuple[str | None, int | None]:
    port = DEFAULT_PORT
    node_list = None
    if launcher.rank == "SLURM_PROCID":
        node_list = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        # Two jobs, or two steps of one, may share a node: each gets a port of its own, below the ephemeral range.
        job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
        port = 15000 + (job * 31 + step) % 15000
    if "MASTER_PORT" in environ:
        port = _number(environ, "MASTER_PORT", minimum=1)
        if port > 65535:
            raise UserError(f"MASTER_PORT={port} must be at most 65535")
    address = environ.get("MASTER_ADDR")
    if launcher is not _TORCHRUN and (num_hosts == 1 or address in _LOCALHOST):
        address = (
            None  # perhaps left over: one host's ranks need none, and several hosts do not meet on their loopbacks
        )
    if address is None and num_hosts == 1:
        address = "127.0.0.1"
    elif address is None and node_list:
        address = first_slurm_host(node_list)
    return (None, None) if address is None else (address, port)


def _first_set(environ: Mapping[str, str], names: tuple[str, ...], needed_by: Launcher | None = None) -> str:
    for name in names:
        if name in environ:
            return name
    known = f"{needed_by.rank} is set ({needed_by.name})" if needed_by else "this is a Slurm step"
    raise UserError(f"{names[0]} is not set though {known}: start all workers with the same launcher")


def _number(environ: Mapping[str, str], name: str, minimum: int = 0) -> int:
    text = environ.get(name)
    if text is None:
        raise UserError(f"{name} is not set, though the launcher's other variables are")
    if not re.fullmatch(r"\s*\d+\s*", text):
        raise UserError(f"{name}={text!r} must be a whole number, {minimum} or more")
    if int(text) < minimum:
        raise UserError(f"{name}={text.strip()} must be {minimum} or more")
    return int(text)
