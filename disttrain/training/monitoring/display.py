"""What a run shows on a console: a progress bar or lines, and a table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from disttrain.training.monitoring.trackers import Tracker

_SECONDS_BETWEEN_LINES = 5.0
_MIB = 2**20


class Display(Tracker):
    """Shows a run's progress and its summary.

    Args:
        console: a terminal gets a progress bar; other outputs get a line now and then.
        directory: of the run, the title of the table.
        step: optimizer steps done.
        num_steps: length of the run.
        position: position of the progress bar, if it is not ``step``. The number of steps is then unknown.
    """

    def __init__(
        self, console: Console, directory: Path, step: int, num_steps: int, position: float | None = None
    ) -> None:
        self._console, self._directory = console, directory
        self._of_total = f"/{num_steps}" if position is None else ""
        self._last_line = time.monotonic()
        self._shown = {"train": "", "evaluation": ""}  # the latest of each, beside the bar
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
            self._progress = Progress(*columns, TextColumn("{task.description}"), console=console)
            self._bar = self._progress.add_task(
                "", total=num_steps, completed=step if position is None else int(position)
            )
            self._progress.start()

    def show_position(self, position: float) -> None:
        if self._progress is not None:
            self._progress.update(self._bar, completed=int(position))

    def log(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        if kind == "train":
            text = f"loss {record['loss']:.4f}  {record['samples_per_second']:.0f} samples/s"
            is_line_due = time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES
            self._show(kind, text, step, record["epoch"], is_line_due)
        elif kind == "evaluation":
            metrics = "  ".join(f"{name} {value:.4f}" for name, value in record.items() if name != "epoch")
            self._show(kind, f"held-out {metrics}", step, record["epoch"], is_line_due=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.close()
        if summary["ended_by"] == "interrupted":
            self._console.print(_interruption(summary), soft_wrap=True, highlight=False, markup=False)
        else:
            self._console.print(_table(summary, self._directory))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _show(self, kind: str, text: str, step: int, epoch: float, is_line_due: bool) -> None:
        if self._progress is not None:
            self._shown[kind] = text
            self._progress.update(self._bar, description="  ".join(filter(None, self._shown.values())))
        elif is_line_due:
            self._last_line = time.monotonic()
            print(f"step {step}{self._of_total}  epoch {epoch:.2f}  {text}", file=self._console.file, flush=True)


def _interruption(summary: Mapping[str, Any]) -> str:
    saved = summary["checkpoint"]
    outcome = f"resume=auto continues from {saved}" if saved else "checkpoints are off, so nothing is saved"
    return f"interrupted after step {summary['steps']} by {summary['interrupted_by']}: {outcome}"


def _table(summary: Mapping[str, Any], directory: Path) -> Table:
    table = Table(show_header=False, title=str(directory))
    for name, value in summary["metrics"].items():
        table.add_row(f"held-out {name.replace('_', ' ')}", f"{value:.4f}")
    steps = f"{summary['steps']} ({summary['epochs']:g} epochs)"
    table.add_row("steps", f"{steps}, stopped early" if summary["ended_by"] == "early_stopping" else steps)
    if (best := summary.get("best")) and best["value"] is not None:
        restored = ", restored" if best["restored"] else ""
        table.add_row(
            f"best {best['metric'].replace('_', ' ')}", f"{best['value']:.4f} (step {best['step']}{restored})"
        )
    if summary["skipped_steps"]:
        table.add_row("skipped steps", f"{summary['skipped_steps']} (a gradient was inf or NaN)")
    table.add_row("workers", f"{summary['world_size']} ({summary['engine']})")
    table.add_row("seconds", f"{summary['seconds']:.1f}")
    table.add_row("samples/s", f"{summary['samples_per_second']:.0f}")
    wire = summary["wire"]
    table.add_row("bytes sent per worker", _bytes(wire["sent_bytes"]))
    table.add_row("bytes if dense fp32", _bytes(wire["dense_bytes"]))
    if wire["sent_bytes"]:
        table.add_row("ratio", f"{wire['dense_bytes'] / wire['sent_bytes']:.1f}x less")
    return table


def _bytes(number: int) -> str:
    return f"{number / _MIB:.1f} MiB" if number >= _MIB else f"{number:,} bytes"
