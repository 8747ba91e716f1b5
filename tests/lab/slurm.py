"""A Slurm cluster of several nodes on one host, from scratch directories: the real slurmctld, slurmd, srun and sbatch.

Each slurmd lives in a UTS and mount namespace of its own, with its own hostname and hosts file, so that whatever asks
for the hostname (Open MPI, Horovod) sees as many hosts as there are nodes. Network, files and processes are the host's.
Needs root and Debian's ``slurm-wlm`` and ``munge``; nothing outside the scratch directory is written or stopped.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.lab.ports import free_ports

_NODE = """
hostname {name}
mount --bind {hosts} /etc/hosts
exec slurmd -D -N {name} -f {config}
"""

_CONFIG = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its old credentials have expired.
AuthInfo=socket={scratch}/munge/socket,cred_expire=10
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={scratch}/state
SlurmdSpoolDir={scratch}/spool-%n
TmpFS={scratch}/tmp-%n
SlurmctldPidFile={scratch}/slurmctld.pid
SlurmdPidFile={scratch}/slurmd-%n.pid
SlurmctldLogFile={scratch}/slurmctld.log
SlurmdLogFile={scratch}/slurmd-%n.log
SchedulerParameters=sched_interval=1
KillWait=5
JobRequeue=1
{nodes}
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP PreemptMode=REQUEUE
"""


def why_not() -> str | None:
    """The reason for which this machine cannot hold the lab, or None if it can."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "unshare") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "starting slurmd needs root"
    return None


@dataclass(frozen=True)
class Cluster:
    scratch: Path
    nodes: tuple[str, ...]

    @property
    def environ(self) -> dict[str, str]:
        """The caller's environment, pointed at this cluster and free of any Slurm job around the caller."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return {**inherited, "SLURM_CONF": str(self.scratch / "slurm.conf")}

    def run(self, *command: str, timeout: float = 60, **kwargs: object) -> subprocess.CompletedProcess[str]:
        """Run a client command (srun, sbatch, scontrol ...) to its end; its output is captured."""
        options = {"env": self.environ, "cwd": self.scratch, "text": True, "capture_output": True, **kwargs}
        return subprocess.run(command, timeout=timeout, **options)  # type: ignore[call-overload, no-any-return]

    def sbatch(self, *arguments: str, **kwargs: object) -> str:
        """Submit, and return the job's id."""
        submitted = self.run("sbatch", "--parsable", *arguments, **kwargs)
        assert submitted.returncode == 0, submitted.stderr
        return submitted.stdout.strip()

    def job_state(self, job: str) -> str:
        shown = self.run("scontrol", "show", "job", job, "--oneliner").stdout
        return next((field.removeprefix("JobState=") for field in shown.split() if field.startswith("JobState=")), "?")

    def wait(self, job: str, timeout: float, states: tuple[str, ...] = ()) -> str:
        """Wait until the job has ended, or is in one of ``states``; returns the state."""
        deadline = time.monotonic() + timeout
        state = self.job_state(job)
        while state not in states and (states or state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "?")):
            if time.monotonic() > deadline:
                self.run("scancel", job)
                raise TimeoutError(f"job {job} was still {state} after {timeout:.0f} s\n{self.logs()}")
            time.sleep(0.2)
            state = self.job_state(job)
        return state

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.scratch.glob("*.log")))


@contextlib.contextmanager
def cluster(num_nodes: int = 2, cpus: int = 2, timeout: float = 30) -> Iterator[Cluster]:
    """Start munged, slurmctld and ``num_nodes`` slurmd; stop them, and the jobs still running, at the end."""
    host, port = socket.gethostname(), free_ports(num_nodes + 1)
    names = tuple(f"n{index}" for index in range(1, num_nodes + 1))
    with tempfile.TemporaryDirectory(prefix="slurm-lab-") as directory, contextlib.ExitStack() as stack:
        scratch = Path(directory)
        scratch.chmod(0o755)
        lab = Cluster(scratch, names)
        hosts = scratch / "hosts"
        hosts.write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", host, *names)))
        config = scratch / "slurm.conf"
        config.write_text(
            _CONFIG.format(
                host=host,
                port=port,
                scratch=scratch,
                nodes="\n".join(
                    f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port + 1 + index} CPUs={cpus}"
                    for index, name in enumerate(names)
                ),
            )
        )
        _start_munge(stack, scratch)
        _start(stack, scratch / "slurmctld.out", ["slurmctld", "-D", "-f", str(config)], lab.environ)
        for name in names:
            (scratch / f"tmp-{name}").mkdir()  # PMIx keeps files of the same name on each node
            script = _NODE.format(name=name, hosts=hosts, config=config)
            command = ["unshare", "--uts", "--mount", "sh", "-e", "-c", script]
            _start(stack, scratch / f"slurmd-{name}.out", command, lab.environ)
        stack.callback(lab.run, "scancel", "--state=RUNNING", "--user=root")
        _wait_until_idle(lab, timeout)
        yield lab


def _start_munge(stack: contextlib.ExitStack, scratch: Path) -> None:
    munge = pwd.getpwnam("munge")
    directory = scratch / "munge"
    directory.mkdir(mode=0o755)
    key = directory / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for path in (directory, key):
        os.chown(path, munge.pw_uid, munge.pw_gid)
    files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={directory / name}" for option, name in files.items()]
    command = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "--foreground", "--force"]
    _start(stack, scratch / "munged.out", [*command, f"--key-file={key}", *options], dict(os.environ))
    _wait_for(lambda: (directory / "socket").exists(), 10, "munged did not open its socket")


def _start(stack: contextlib.ExitStack, output: Path, command: list[str], environ: dict[str, str]) -> None:
    with output.open("w") as stream:
        # A session of its own: a Ctrl-C on the tests reaches the daemons through `_stop`, in order.
        daemon = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )
    stack.callback(_stop, daemon)


def _stop(daemon: subprocess.Popen[bytes]) -> None:
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait(10)


def _wait_until_idle(lab: Cluster, timeout: float) -> None:
    def idle() -> bool:
        states = lab.run("sinfo", "--noheader", "--Node", "--format=%T").stdout.split()
        return states == ["idle"] * len(lab.nodes)

    try:
        _wait_for(idle, timeout, "the nodes did not come up")
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{lab.logs()}") from None


def _wait_for(condition: object, timeout: float, message: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"{message} within {timeout:.0f} s")
        time.sleep(0.1)
