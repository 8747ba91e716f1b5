"""A small cluster on one machine: N hosts in network namespaces, joined by links of a chosen rate.

    with ShapedNetwork(num_hosts=4, rate_mbit=1000) as network:
        workers = [network.run(host, ["python", "train.py"], env) for host in network.hosts]

Every host is a network namespace with its own host name, hosts file and one interface, ``e0``. Another namespace holds
the switch, a bridge. The machine's own network is not affected, so several networks can exist at the same time, and
deleting the namespaces leaves nothing behind. This needs Linux, root, `ip` and `tc`: check
``ShapedNetwork.unavailable()`` first.

A token bucket at both ends of every link enforces the rate, since a queue shapes only outgoing traffic. Latency is not
shaped; it stays that of the local machine, some tens of microseconds.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

PREFIX = "disttrain"
NAMESPACE_FILES = Path("/run/netns")
HOSTS_FILES = Path("/etc/netns")  # `ip netns exec NAME` mounts the files of /etc/netns/NAME over /etc
INTERFACE = "e0"
_counter = itertools.count()


class ShapedNetwork:
    """`num_hosts` hosts named w0, w1, ... on one switch.

    Args:
        num_hosts: number of hosts, 1 to 200.
        rate_mbit: rate of every link in each direction, in 10^6 bits per second; None leaves the links unshaped.
        time_limit: seconds after which a command started by ``run`` is killed, even if this process has ended.

    Raises:
        RuntimeError: on entry, if the machine cannot create namespaces.
    """

    def __init__(self, num_hosts: int, rate_mbit: float | None = 1000, time_limit: float = 600) -> None:
        if not 1 <= num_hosts <= 200:
            raise ValueError(f"num_hosts must be between 1 and 200, not {num_hosts}")
        self.hosts = [f"w{i}" for i in range(num_hosts)]
        self.addresses = {host: f"10.77.0.{i + 1}" for i, host in enumerate(self.hosts)}
        self.interface = INTERFACE
        self.rate_mbit = rate_mbit
        self.time_limit = time_limit
        self._name = f"{PREFIX}-{os.getpid()}-{next(_counter)}"
        self._directory: Path | None = None
        self._previous_handler: Any = None

    @staticmethod
    @functools.cache
    def unavailable() -> str | None:
        """Create a small network and return the reason if this machine cannot, else None."""
        if sys.platform != "linux":
            return "network namespaces need Linux"
        if os.geteuid() != 0:
            return "network namespaces need root"
        for tool in ("ip", "tc", "unshare"):
            if shutil.which(tool) is None:
                return f"network namespaces need `{tool}` (apt-get install iproute2 util-linux)"
        try:
            with ShapedNetwork(1, rate_mbit=1000) as network:
                network.run("w0", ["true"]).wait(timeout=30)
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            return f"network namespaces do not work here: {error}"
        return None

    def namespace(self, host: str) -> str:
        return f"{self._name}-{host}"

    def __enter__(self) -> ShapedNetwork:
        remove_leftovers()
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            # By default SIGTERM ends a process without unwinding the stack, which would leave the namespaces behind.
            self._previous_handler = signal.signal(signal.SIGTERM, _exit_on_signal)
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def run(
        self,
        host: str,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        cwd: str | Path | None = None,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool = True,
    ) -> subprocess.Popen[Any]:
        """Start `command` on `host`, with `env` added to this process's environment.

        On the host, ``ssh HOST COMMAND`` reaches the other hosts through a script that needs no daemon, so `mpirun` and
        `horovodrun` work with ``-H w0:1,w1:1`` as on a cluster.
        """
        assert self._directory is not None, "use the network as a context manager"
        environment = {**os.environ, **(env or {})}
        environment["PATH"] = f"{self._directory}{os.pathsep}{environment.get('PATH', os.defpath)}"
        limit = ["timeout", "--kill-after=10", str(self.time_limit)]
        return subprocess.Popen(
            [*limit, str(self._directory / "on-host"), host, *command],
            env=environment,
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=text,
        )

    def cut(self, host: str) -> None:
        """Take the link of `host` down, like pulling its cable."""
        _ip("-n", self.namespace("hub"), "link", "set", f"to-{host}", "down")

    def mend(self, host: str) -> None:
        """Bring the link of `host` up again after ``cut``."""
        _ip("-n", self.namespace("hub"), "link", "set", f"to-{host}", "up")

    def _build(self) -> None:
        hub = self.namespace("hub")
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "switch", "type", "bridge")
        _ip("-n", hub, "link", "set", "switch", "up")
        lines = ["127.0.0.1 localhost", *(f"{address} {host}" for host, address in self.addresses.items())]
        for host, address in self.addresses.items():
            namespace = self.namespace(host)
            port = f"to-{host}"
            _ip("netns", "add", namespace)
            _ip("-n", hub, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", namespace)
            _ip("-n", hub, "link", "set", port, "master", "switch", "up")
            _ip("-n", namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", namespace, "link", "set", INTERFACE, "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
            if self.rate_mbit is not None:
                self._shape(hub, port)
                self._shape(namespace, INTERFACE)
            hosts_file = HOSTS_FILES / namespace / "hosts"
            hosts_file.parent.mkdir(parents=True)
            hosts_file.write_text("\n".join(lines) + "\n")
        self._write_scripts()

    def _shape(self, namespace: str, device: str) -> None:
        assert self.rate_mbit is not None
        rate = int(self.rate_mbit * 1e6)
        burst = max(64 * 1024, int(rate / 8 * 0.002))  # 2 ms at the rate, at least one offloaded TCP segment
        arguments = ["root", "tbf", "rate", f"{rate}bit", "burst", str(burst), "latency", "100ms"]
        _call("tc", "-n", namespace, "qdisc", "add", "dev", device, *arguments)

    def _write_scripts(self) -> None:
        """Write `on-host HOST COMMAND...`, which runs a command on a host, and `ssh`, which accepts ssh's options."""
        self._directory = Path(tempfile.mkdtemp(prefix=f"{self._name}-"))
        enter = f'exec ip netns exec {self._name}-"$host" unshare --uts -- sh -c \'hostname "$0" && exec "$@"\' "$host"'
        scripts = {
            "on-host": f'#!/bin/sh\nhost=$1\nshift\n{enter} "$@"\n',
            # Like ssh it takes options before and after the host, and passes the remaining words to a shell.
            "ssh": "#!/bin/sh\n"
            "host=\n"
            "while [ $# -gt 0 ]; do\n"
            "  case $1 in\n"
            "    -[BbcDEeFIiJLlmOopQRSWw]) shift 2 ;;\n"
            "    -*) shift ;;\n"
            '    *) [ -z "$host" ] || break; host=${1#*@}; shift ;;\n'
            "  esac\n"
            "done\n"
            f'{enter} sh -c "$*"\n',
        }
        for name, script in scripts.items():
            path = self._directory / name
            path.write_text(script)
            path.chmod(0o755)

    def _remove(self) -> None:
        _remove_namespaces(self._name)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None


def rank_environment(
    rank: int, world_size: int, *, master: str, port: int, interface: str, slots: int = 1
) -> dict[str, str]:
    """Return the environment variables of a rank for torch.distributed, with ``slots`` ranks on each host."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank % slots),
        "LOCAL_WORLD_SIZE": str(slots),
        "MASTER_ADDR": master,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": interface,
    }


def remove_leftovers() -> None:
    """Remove the networks of processes that ended without cleaning up (SIGKILL)."""
    names = {"-".join(path.name.split("-")[:3]) for path in NAMESPACE_FILES.glob(f"{PREFIX}-*-*-*")}
    for name in names:
        owner = name.split("-")[1]
        if owner.isdecimal() and not Path("/proc", owner).exists():
            _remove_namespaces(name)


def _remove_namespaces(name: str) -> None:
    for path in sorted(NAMESPACE_FILES.glob(f"{name}-*")):
        # A namespace exists as long as it has processes, so they are killed first.
        pids = subprocess.run(["ip", "netns", "pids", path.name], capture_output=True, text=True, check=False).stdout
        for pid in pids.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", path.name], capture_output=True, check=False)
        shutil.rmtree(HOSTS_FILES / path.name, ignore_errors=True)
    for path in Path(tempfile.gettempdir()).glob(f"{name}-*"):
        shutil.rmtree(path, ignore_errors=True)


def _ip(*arguments: str) -> None:
    _call("ip", *arguments)


def _call(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if result.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed: {result.stderr.strip()}")


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
