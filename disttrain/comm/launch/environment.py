"""Detect the launcher that started this process, and read ranks from its environment variables.

Nothing here uses the network or imports an engine, so detection can come first, and recorded environments can test it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from disttrain.errors import UserError

DEFAULT_PORT = 29500
_LOCALHOST = ("127.0.0.1", "localhost", "::1")
# Slurm gives steps that srun did not start (batch script, interactive shell, ...) the highest 32-bit numbers.
_FIRST_SPECIAL_STEP = 0xFFFF_FFF0


@dataclass(frozen=True)
class Environment:
    """What the launcher says about this process.

    Attributes:
        launcher: name of the launcher.
        engine: the engine that fits the launcher. The user may choose another.
        rank, world_size: this worker among all workers.
        local_rank, local_size: this worker among those of its host.
        num_hosts: number of hosts; None if the launcher does not say.
        master_addr, master_port: where rank 0 listens; None if the launcher does not say.
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
        """Return the address and port where rank 0 listens, for an engine that needs them (torch).

        Raises:
            UserError: the launcher does not say, and not all ranks are known to be on one host.
        """
        if self.master_addr is None or self.master_port is None:
            raise UserError(
                f"{self.launcher} does not say where rank 0 runs: export MASTER_ADDR (an address of rank 0's host that "
                "the other hosts can reach) and MASTER_PORT on every host, or choose the engine that fits the launcher"
            )
        return self.master_addr, self.master_port


@dataclass(frozen=True)
class Launcher:
    """The names of a launcher's environment variables.

    Attributes:
        name: of the launcher.
        engine: the engine that fits the launcher.
        rank, local_rank: names of variables.
        world_size, num_hosts: alternative names; the first that is set counts.
        local_size: a name, or a function that computes the local size from the variables.
        when: a further condition, for launchers whose variables alone do not identify them.
    """

    name: str
    engine: str
    rank: str
    world_size: tuple[str, ...]
    local_rank: str
    local_size: str | Callable[[Mapping[str, str]], int]
    num_hosts: tuple[str, ...] = ()
    when: Callable[[Mapping[str, str]], bool] = lambda environ: True

    @property
    def is_srun(self) -> bool:
        return self.rank == "SLURM_PROCID"


def detect(environ: Mapping[str, str] = os.environ) -> Environment:
    """Read the launcher's variables. Without a launcher, the environment is that of a single process.

    Raises:
        UserError: variables are missing, are not numbers, or contradict each other; the message names them.
    """
    environ = {name: value for name, value in environ.items() if value.strip()}  # treat empty variables as unset
    launcher = _find_launcher(environ)
    if launcher is None:
        return Environment("none", "single", num_hosts=1)

    world_size_name, world_size = _world_size(environ, launcher)
    rank = _number(environ, launcher.rank)
    if rank >= world_size:
        raise UserError(f"{launcher.rank}={rank} must be below {world_size_name}={world_size}")
    local_rank, local_size = _local_rank_and_size(environ, launcher, rank, world_size)
    if local_rank >= local_size:
        raise UserError(f"{launcher.local_rank}={local_rank} must be below {local_size}, the workers on this host")
    if local_size > world_size:
        raise UserError(f"{local_size} workers on this host are more than {world_size_name}={world_size}")

    num_hosts = 1 if local_size == world_size else None
    num_hosts_name = _first_set(environ, launcher.num_hosts)
    if num_hosts is None and num_hosts_name is not None:
        num_hosts = _number(environ, num_hosts_name, minimum=1)
    master_addr, master_port = _master(environ, launcher, num_hosts)
    # A single task of srun has no others to join, for example a shell that `srun --pty` opened.
    engine = "single" if launcher.is_srun and world_size == 1 else launcher.engine
    return Environment(
        launcher.name, engine, rank, world_size, local_rank, local_size, num_hosts, master_addr, master_port
    )


def _find_launcher(environ: Mapping[str, str]) -> Launcher | None:
    """Return the launcher whose variables describe this process, or None."""
    candidates = [launcher for launcher in LAUNCHERS if launcher.rank in environ and launcher.when(environ)]
    if candidates[:1] == [_TORCHRUN] and "TORCHELASTIC_RUN_ID" not in environ and candidates[1:]:
        return _choose_over_manual_ranks(candidates[1], environ)
    return candidates[0] if candidates else None


def _choose_over_manual_ranks(launcher: Launcher, environ: Mapping[str, str]) -> Launcher:
    """Decide between a launcher's variables and RANK and WORLD_SIZE that torchrun did not set.

    A script may have set RANK and WORLD_SIZE: to start workers of its own, or to repeat the launcher's ranks. Or they
    are left over from a pod (Kubernetes sets RANK=0 and WORLD_SIZE=1), an image or a profile.
    """
    if "WORLD_SIZE" not in environ:
        return launcher
    size_name, size = _world_size(environ, launcher)
    _, manual_size = _world_size(environ, _TORCHRUN)
    if size == 1 or manual_size > size:
        return _TORCHRUN
    if manual_size == 1:
        return launcher
    if manual_size == size and _number(environ, "RANK") == _number(environ, launcher.rank):
        return _TORCHRUN
    raise UserError(
        f"RANK={environ['RANK']} and WORLD_SIZE={manual_size} contradict {launcher.name}, which says {launcher.rank}="
        f"{environ[launcher.rank]} and {size_name}={size}: unset RANK and WORLD_SIZE if they are left over, or else "
        f"unset {launcher.rank}"
    )


def slurm_tasks_per_node(environ: Mapping[str, str]) -> int:
    """Return the number of the step's tasks on this node, from a list such as ``2(x3),1`` and the node's index."""
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    name = _first_set(environ, names) or names[0]
    counts: list[int] = []
    for part in _text(environ, name).split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UserError(f"{name}={environ[name]!r} must have the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    if node >= len(counts):
        raise UserError(f"SLURM_NODEID={node} must be below {len(counts)}, the nodes in {name}={environ[name]!r}")
    return counts[node]


def first_slurm_host(node_list: str) -> str:
    """Return the first host of a compressed list of Slurm: ``gpu[003-007,9],login1`` -> ``gpu003``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list.strip())
    if first is None:
        raise UserError(f"cannot parse Slurm's node list {node_list!r}: export MASTER_ADDR, the host of rank 0")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _in_srun_step(environ: Mapping[str, str]) -> bool:
    # The batch script has SLURM_PROCID=0 and the job's SLURM_NTASKS too, but is a single process that no others will
    # join. Only steps that srun started have an ordinary step id.
    return "SLURM_STEP_ID" in environ and _number(environ, "SLURM_STEP_ID") < _FIRST_SPECIAL_STEP


def _is_horovodrun_mpi(environ: Mapping[str, str]) -> bool:
    # `horovodrun --mpi` sets no variables of its own, but passes all of these flags to mpirun.
    flags = {"orte_tag_output": "1", "pml": "ob1", "btl": "^openib", "rmaps_base_mapping_policy": "slot"}
    return all(environ.get(f"OMPI_MCA_{name}") == value for name, value in flags.items())


def _srun(name: str, engine: str, variable: str) -> Launcher:
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

# In order of precedence. If one launcher starts another, the inner launcher's variables count. Slurm comes last, since
# mpirun, horovodrun and torchrun all run inside its jobs and inherit its variables.
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
    replace(_OPEN_MPI, name="horovodrun --mpi", engine="horovod", when=_is_horovodrun_mpi),
    _OPEN_MPI,
    Launcher(
        name="mpiexec (MPICH)",
        engine="mpi",
        rank="PMI_RANK",
        world_size=("PMI_SIZE",),
        local_rank="MPI_LOCALRANKID",
        local_size="MPI_LOCALNRANKS",
        # `srun --mpi=pmi2` sets PMI_RANK too. Only Hydra sets MPI_LOCALRANKID, even if it starts workers through srun.
        when=lambda environ: "MPI_LOCALRANKID" in environ or not _in_srun_step(environ),
    ),
    _srun("srun --mpi=pmix", "mpi", "PMIX_RANK"),
    _srun("srun --mpi=pmi2", "mpi", "PMI_RANK"),
    _srun("srun", "torch", "SLURM_PROCID"),
)


def _local_rank_and_size(environ: Mapping[str, str], launcher: Launcher, rank: int, world_size: int) -> tuple[int, int]:
    if callable(launcher.local_size):
        return _number(environ, launcher.local_rank), launcher.local_size(environ)
    names = (launcher.local_rank, launcher.local_size)
    missing = [name for name in names if name not in environ]
    if not missing:
        return _number(environ, names[0]), _number(environ, names[1], minimum=1)
    if len(missing) == 1:
        (present,) = set(names) - set(missing)
        raise UserError(f"{missing[0]} is not set, but {present} is: set both or neither")
    # Ranks that a user exported: if they meet on localhost, all are on this host, else assume one rank per host.
    return (rank, world_size) if environ.get("MASTER_ADDR") in _LOCALHOST else (0, 1)


def _master(environ: Mapping[str, str], launcher: Launcher, num_hosts: int | None) -> tuple[str | None, int | None]:
    port = DEFAULT_PORT
    node_list = None
    if launcher.is_srun:
        node_list = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        # Jobs and steps may share a node, so give each its own port, below the ephemeral range.
        job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
        port = 15000 + (job * 31 + step) % 15000
    if "MASTER_PORT" in environ:
        port = _number(environ, "MASTER_PORT", minimum=1)
        if port > 65535:
            raise UserError(f"MASTER_PORT={port} must be at most 65535")
    address = environ.get("MASTER_ADDR")
    if launcher is not _TORCHRUN and (num_hosts == 1 or address in _LOCALHOST):
        address = None  # left over: ranks on one host need no address, and ranks on several cannot meet on a loopback
    if address is None and num_hosts == 1:
        address = "127.0.0.1"
    elif address is None and node_list:
        address = first_slurm_host(node_list)
    return (None, None) if address is None else (address, port)


def _world_size(environ: Mapping[str, str], launcher: Launcher) -> tuple[str, int]:
    """Return the name of the variable that has the world size, and its value."""
    name = _first_set(environ, launcher.world_size)
    if name is None:
        raise UserError(
            f"{launcher.world_size[0]} is not set, but {launcher.rank} is ({launcher.name}): start all workers with "
            "the same launcher"
        )
    return name, _number(environ, name, minimum=1)


def _first_set(environ: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in environ), None)


def _number(environ: Mapping[str, str], name: str, minimum: int = 0) -> int:
    text = _text(environ, name).strip()
    if not re.fullmatch(r"\d+", text) or int(text) < minimum:
        raise UserError(f"{name}={text!r} must be an integer, {minimum} or more")
    return int(text)


def _text(environ: Mapping[str, str], name: str) -> str:
    if name not in environ:
        raise UserError(f"{name} is not set, but other variables of the launcher are: start all workers with it")
    return environ[name]
