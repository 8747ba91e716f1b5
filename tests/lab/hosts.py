"""Several "hosts" on one machine: each a UTS and mount namespace with a hostname, a hosts file and an sshd of its own.

For launchers that reach other hosts by ssh and tell them apart by name (mpirun, horovodrun, torchrun.sh). The network
is the machine's: host i has the loopback address 127.0.0.i. Needs root and openssh-server; nothing outside the scratch
directory is written or stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.lab.ports import free_ports

_ENTER = """
hostname {name}
mount --bind {scratch}/hosts /etc/hosts
mount --bind {scratch}/ssh_config /etc/ssh/ssh_config
"""
_DAEMON = """
mount -t tmpfs tmpfs /run
mkdir /run/sshd
exec {sshd} -D -e -f {scratch}/sshd_config -o ListenAddress={address}
"""
_CLIENT_CONFIG = """
Host *
    Port {port}
    IdentityFile {scratch}/key
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking no
    LogLevel ERROR
"""
_SERVER_CONFIG = """
Port {port}
HostKey {scratch}/key
AuthorizedKeysFile {scratch}/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
"""


def why_not() -> str | None:
    """The reason for which this machine cannot hold the lab, or None if it can."""
    missing = [name for name in ("ssh", "ssh-keygen", "unshare") if shutil.which(name) is None]
    if missing or _sshd() is None:
        return f"{', '.join(missing or ['sshd'])} not found (apt-get install openssh-server)"
    if os.geteuid() != 0:
        return "making hosts needs root"
    return None


@dataclass(frozen=True)
class Hosts:
    scratch: Path
    names: tuple[str, ...]

    def command(self, *command: str) -> list[str]:
        """The command line that runs ``command`` on the first host."""
        script = _ENTER.format(name=self.names[0], scratch=self.scratch) + 'exec "$@"'
        return ["unshare", "--uts", "--mount", "sh", "-e", "-c", script, "sh", *command]


@contextlib.contextmanager
def hosts(count: int = 2) -> Iterator[Hosts]:
    names = tuple(f"h{index}" for index in range(1, count + 1))
    with tempfile.TemporaryDirectory(prefix="hosts-lab-") as directory, contextlib.ExitStack() as stack:
        scratch, port = Path(directory), free_ports(1)
        lines = [f"127.0.0.{index} {name}\n" for index, name in enumerate(names, 1)]
        (scratch / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        (scratch / "ssh_config").write_text(_CLIENT_CONFIG.format(port=port, scratch=scratch))
        (scratch / "sshd_config").write_text(_SERVER_CONFIG.format(port=port, scratch=scratch))
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(scratch / "key")]
        subprocess.run(keygen, check=True, timeout=30)
        for index, name in enumerate(names, 1):
            values = {"name": name, "scratch": scratch, "address": f"127.0.0.{index}", "sshd": _sshd()}
            script = (_ENTER + _DAEMON).format(**values)
            with (scratch / f"{name}.log").open("w") as log:
                command = ["unshare", "--uts", "--mount", "sh", "-e", "-c", script]
                daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(daemon.wait, 10)
            stack.callback(daemon.terminate)
            _wait_for_port(str(values["address"]), port, scratch / f"{name}.log")
        yield Hosts(scratch, names)


def _sshd() -> str | None:
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin")  # sshd insists on its absolute path


def _wait_for_port(address: str, port: int, log: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=5):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"sshd did not start\n{log.read_text()}")
        time.sleep(0.1)
