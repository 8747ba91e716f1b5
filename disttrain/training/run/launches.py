"""Launchers that start workers again (torchrun, Horovod elastic): those go on with the run that this launch began."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from disttrain.comm import Communicator
from disttrain.comm.launch.horovod_elastic import can_restart_process

_FILE = ".launch"


def launch(environ: Mapping[str, str] = os.environ) -> str | None:
    """What tells this launch from all others: the launcher's process on this host, which starts lost workers again.

    None if the launcher does no such thing. (torchrun does not count it as a restart when a host joins.)
    """
    if "TORCHELASTIC_RUN_ID" not in environ and not can_restart_process(environ):
        return None
    launcher = os.getppid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # no Linux
        return None
    return f"{boot} {launcher} {started}"


def launches(comm: Communicator) -> list[str]:
    """Those of all ranks. A collective."""
    return sorted({found for found in comm.all_gather_object(launch()) if found is not None})


def began(directory: Path, launches: list[str]) -> bool:
    """Whether the run in this directory was begun, or taken over, by one of these launches."""
    path = directory / _FILE
    return path.exists() and not set(launches).isdisjoint(path.read_text().splitlines())


def claim(directory: Path, launches: list[str]) -> None:
    """Note that these launches write to the directory now."""
    (directory / _FILE).write_text("".join(f"{one}\n" for one in launches))
