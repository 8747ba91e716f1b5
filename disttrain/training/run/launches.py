"""Launchers that restart workers (torchrun, Horovod elastic): restarted workers continue the run of their launch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from disttrain.comm import Communicator
from disttrain.comm.launch.horovod_elastic import can_restart_process

_FILE = ".launch"


def launch_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return an identifier of this launch: that of the launcher's process on this host, which restarts lost workers.

    None if the launcher does not restart workers. (torchrun's restart count is of no use here: it stays the same when
    a host joins.)
    """
    if "TORCHELASTIC_RUN_ID" not in environ and not can_restart_process(environ):
        return None
    launcher = os.getppid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # not Linux
        return None
    return f"{boot} {launcher} {started}"


def gather_launch_ids(comm: Communicator) -> list[str]:
    """Return the identifiers on all ranks. A collective."""
    return sorted({found for found in comm.all_gather_object(launch_id()) if found is not None})


def is_run_of(directory: Path, launch_ids: list[str]) -> bool:
    """Whether one of these launches started or resumed the run in the directory."""
    path = directory / _FILE
    return path.exists() and not set(launch_ids).isdisjoint(path.read_text().splitlines())


def record_launches(directory: Path, launch_ids: list[str]) -> None:
    """Note in the directory that its run now belongs to these launches."""
    (directory / _FILE).write_text("".join(f"{launch}\n" for launch in launch_ids))
