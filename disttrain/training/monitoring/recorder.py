"""What a run reports: metrics.jsonl, TensorBoard, summary.json, a progress bar and a table. On rank 0 alone."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from disttrain.training import strict_json

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0
_MIB = 2**20


class Recorder:
    """Writes a run's records and shows its progress. ``NullRecorder`` is its twin on the other ranks.

    Args:
        directory: the run's. Records of a resumed run that are later than ``step`` are dropped: they will come again.
        step: optimizer steps done already.
        position: where the progress bar stands, if not at ``step``; the number of steps is then not known beforehand.
        num_steps: of the whole run.
        console: where to report; a terminal gets a progress bar, anything else a line now and then.
    """

    def __init__(
        self, directory: Path, step: int, num_steps: int, console: Console, position: float | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._directory, self._console = directory, console
        self._of_all = f"/{num_steps}" if position is None else ""
        path = directory / "metrics.jsonl"
        kept = [line for line in _lines(path) if (found := _step_of(line)) is not None and found <= step]
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)
        self._is_incomplete = False
        self._last_line = time.monotonic()
        self._shown = {"train": "", "evaluation": ""}  # beside the bar: the newest of both
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
            self._progress = Progress(*columns, TextColumn("{task.description}"), console=console)
            self._bar = self._progress.add_task(
                "", total=num_steps, completed=step if position is None else int(position)
            )
            self._progress.start()

    def step(self, position: float) -> None:
        """An optimizer step is done, and the run stands at ``position``."""
        if self._progress is not None:
            self._progress.update(self._bar, completed=int(position))

    def train(self, step: int, record: Mapping[str, Any]) -> None:
        """Note what a training step showed."""
        self._note("train", step, record)
        text = f"loss {record['loss']:.4f}  {record['samples_per_second']:.0f} samples/s"
        is_line_due = time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES
        self._show("train", text, step, record["epoch"], is_line_due)

    def evaluation(self, step: int, record: Mapping[str, Any]) -> None:
        """Note what an evaluation gave."""
        self._note("evaluation", step, record)
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in record.items() if name != "epoch")
        self._show("evaluation", f"held-out {metrics}", step, record["epoch"], is_line_due=True)

    def health(self, step: int, record: Mapping[str, float]) -> None:
        """Note numbers by which a run's health is judged."""
        self._note("health", step, record)

    def event(self, step: int, record: Mapping[str, Any]) -> None:
        """Note what is no row of numbers, in metrics.jsonl alone."""
        self._write("event", step, record)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json and show the table."""
        with self._going_on():
            _write_json(self._directory / "summary.json", summary)
        self._stop()
        if summary["ended_by"] == "interrupted":
            self._console.print(_interruption(summary), soft_wrap=True, highlight=False, markup=False)
        else:
            self._console.print(_table(summary, self._directory))

    def close(self) -> None:
        self._stop()
        with self._going_on():
            self._file.close()
        with self._going_on():
            self._tensorboard.close()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _note(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        self._write(kind, step, record)
        with self._going_on():
            for name, value in record.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def _write(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        with self._going_on():
            self._file.write(strict_json.dumps({"kind": kind, "step": step, **record}) + "\n")
            self._file.flush()

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """A disk that is full costs records, with a warning, but not the run."""
        try:
            yield
        except OSError as error:
            if not self._is_incomplete:
                logger.warning("records are lost, the run goes on: %s", error)
            self._is_incomplete = True

    def _show(self, kind: str, text: str, step: int, epoch: float, is_line_due: bool) -> None:
        if self._progress is not None:
            self._shown[kind] = text
            self._progress.update(self._bar, description="  ".join(filter(None, self._shown.values())))
        elif is_line_due:
            self._last_line = time.monotonic()
            print(f"step {step}{self._of_all}  epoch {epoch:.2f}  {text}", file=self._console.file, flush=True)


class NullRecorder:
    """The recorder of all ranks but one."""

    def step(self, position: float) -> None: ...
    def train(self, step: int, record: Mapping[str, Any]) -> None: ...
    def evaluation(self, step: int, record: Mapping[str, Any]) -> None: ...
    def health(self, step: int, record: Mapping[str, float]) -> None: ...
    def event(self, step: int, record: Mapping[str, Any]) -> None: ...
    def finish(self, summary: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


def _lines(path: Path) -> list[str]:
    """Whole lines; a killed run may have left half of one."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _step_of(line: str) -> int | None:
    """None for a line that is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError):
        return None


def _write_json(path: Path, value: Any) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(strict_json.dumps(value, indent=1) + "\n")
    os.replace(aside, path)


def _interruption(summary: Mapping[str, Any]) -> str:
    saved = summary["checkpoint"]
    fate = f"resume=auto goes on from {saved}" if saved else "checkpoints are off, so nothing is saved"
    return f"interrupted after step {summary['steps']} by {summary['interrupted_by']}: {fate}"


def _table(summary: Mapping[str, Any], directory: Path) -> Table:
    table = Table(show_header=False, title=str(directory))
    for name, value in summary["metrics"].items():
        table.add_row(f"held-out {name.replace('_', ' ')}", f"{value:.4f}")
    steps = f"{summary['steps']} ({summary['epochs']:g} epochs)"
    table.add_row("steps", f"{steps}, stopped early" if summary["ended_by"] == "early_stopping" else steps)
    if (best := summary.get("best")) and best["value"] is not None:
        restored = ", put back" if best["restored"] else ""
        table.add_row(
            f"best {best['metric'].replace('_', ' ')}", f"{best['value']:.4f} (step {best['step']}{restored})"
        )
    if summary["skipped_steps"]:
        table.add_row("skipped steps", f"{summary['skipped_steps']} (a gradient was inf or NaN)")
    table.add_row("workers", f"{summary['world_size']} ({summary['engine']})")
    table.add_row("seconds", f"{summary['seconds']:.1f}")
    table.add_row("samples/s", f"{summary['samples_per_second']:.0f}")
    wire = summary["wire"]
    table.add_row("bytes sent, a worker", _bytes(wire["sent_bytes"]))
    table.add_row("bytes as dense fp32", _bytes(wire["dense_bytes"]))
    if wire["sent_bytes"]:
        table.add_row("ratio", f"{wire['dense_bytes'] / wire['sent_bytes']:.1f}x fewer")
    return table


def _bytes(number: int) -> str:
    return f"{number / _MIB:.1f} MiB" if number >= _MIB else f"{number:,} bytes"
