"""Trackers: where the records of a run go. ``metrics.jsonl`` and TensorBoard are two; a script may add its own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from disttrain.training.run import strict_json


class Tracker:
    """Receives the records of a run. The base class ignores them.

    All methods are called on rank 0 only, but a script constructs the tracker on every rank: open files and connections
    in the first ``log``.

    If a tracker raises, that record is lost, with one warning for all, and the run continues. ``Trainer`` takes
    trackers::

        class Printer(Tracker):
            def log(self, kind, step, record):
                print(kind, step, dict(record))

        Trainer(config, comm, trackers=[Printer()])
    """

    def log(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        """Take a record. A resumed run repeats the records of steps after its checkpoint.

        Args:
            kind: "train", "evaluation" and "health" records are numbers by name. "event" records also hold text.
            step: optimizer steps done.
            record: the values by name.
        """

    def show_position(self, position: float) -> None:
        """Take the position of the run, in steps; after every step."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Take the content of summary.json, at the end of a run."""

    def close(self) -> None:
        """Release what the tracker holds. Called once, also if the run fails."""


class JSONLines(Tracker):
    """Writes ``metrics.jsonl``, one record per line, and ``summary.json``.

    Args:
        directory: of the run. Records of steps after ``step`` are dropped, since a resumed run repeats them.
        step: optimizer steps done.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self._directory = directory
        path = directory / "metrics.jsonl"
        kept = [line for line in _lines(path) if (found := _step_of(line)) is not None and found <= step]
        path.write_text("".join(kept))
        self._file = path.open("a")

    def log(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        self._file.write(strict_json.dumps({"kind": kind, "step": step, **record}) + "\n")
        self._file.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        _write_json(self._directory / "summary.json", summary)

    def close(self) -> None:
        self._file.close()


class TensorBoard(Tracker):
    """Writes TensorBoard scalars, named ``kind/name``; no events.

    Args:
        directory: of the run.
        step: optimizer steps done. Scalars of later steps are hidden.
    """

    def __init__(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        if kind != "event":
            for name, value in record.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


def _lines(path: Path) -> list[str]:
    """Return the complete lines; a killed run may have left half of one."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _step_of(line: str) -> int | None:
    """Return the step of a record, or None if the line is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError):
        return None


def _write_json(path: Path, value: Any) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(strict_json.dumps(value, indent=1) + "\n")
    os.replace(aside, path)
