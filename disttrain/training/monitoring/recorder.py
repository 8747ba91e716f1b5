"""What a run reports: metrics.jsonl, TensorBoard, summary.json, a progress bar and a table. On rank 0 only."""

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

from disttrain.training.run import strict_json

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0
_MIB = 2**20


class Recorder:
    """Records nothing: the base of ``FileRecorder``, and what ranks other than 0 have."""

    def show_position(self, position: float) -> None:
        """Move the progress bar to ``position``, in steps."""

    def log_training(self, step: int, record: Mapping[str, Any]) -> None:
        """Record the numbers of a training step."""

    def log_evaluation(self, step: int, record: Mapping[str, Any]) -> None:
        """Record the metrics of an evaluation."""

    def log_health(self, step: int, record: Mapping[str, float]) -> None:
        """Record numbers by which the health of the run is judged."""

    def log_event(self, step: int, record: Mapping[str, Any]) -> None:
        """Record values that are not all numbers; in metrics.jsonl only."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json and show the table."""

    def close(self) -> None: ...


class FileRecorder(Recorder):
    """Writes a run's records and shows its progress.

    Args:
        directory: of the run. Records of steps after ``step`` are dropped, since a resumed run repeats them.
        step: optimizer steps done.
        num_steps: length of the run.
        console: where to report. A terminal gets a progress bar; other outputs get a line now and then.
        position: position of the progress bar, if it is not ``step``. The number of steps is then unknown.
    """

    def __init__(
        self, directory: Path, step: int, num_steps: int, console: Console, position: float | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._directory, self._console = directory, console
        self._of_total = f"/{num_steps}" if position is None else ""
        path = directory / "metrics.jsonl"
        kept = [line for line in _lines(path) if (found := _step_of(line)) is not None and found <= step]
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)
        self._is_incomplete = False
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

    def log_training(self, step: int, record: Mapping[str, Any]) -> None:
        self._log("train", step, record)
        text = f"loss {record['loss']:.4f}  {record['samples_per_second']:.0f} samples/s"
        is_line_due = time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES
        self._show("train", text, step, record["epoch"], is_line_due)

    def log_evaluation(self, step: int, record: Mapping[str, Any]) -> None:
        self._log("evaluation", step, record)
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in record.items() if name != "epoch")
        self._show("evaluation", f"held-out {metrics}", step, record["epoch"], is_line_due=True)

    def log_health(self, step: int, record: Mapping[str, float]) -> None:
        self._log("health", step, record)

    def log_event(self, step: int, record: Mapping[str, Any]) -> None:
        self._write("event", step, record)

    def finish(self, summary: Mapping[str, Any]) -> None:
        with self._tolerating_os_errors():
            _write_json(self._directory / "summary.json", summary)
        self._stop()
        if summary["ended_by"] == "interrupted":
            self._console.print(_interruption(summary), soft_wrap=True, highlight=False, markup=False)
        else:
            self._console.print(_table(summary, self._directory))

    def close(self) -> None:
        self._stop()
        with self._tolerating_os_errors():
            self._file.close()
        with self._tolerating_os_errors():
            self._tensorboard.close()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _log(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        self._write(kind, step, record)
        with self._tolerating_os_errors():
            for name, value in record.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def _write(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        with self._tolerating_os_errors():
            self._file.write(strict_json.dumps({"kind": kind, "step": step, **record}) + "\n")
            self._file.flush()

    @contextlib.contextmanager
    def _tolerating_os_errors(self) -> Iterator[None]:
        """Lose records when the disk is full, with a warning, rather than end the run."""
        try:
            yield
        except OSError as error:
            if not self._is_incomplete:
                logger.warning("records are lost, and the run continues: %s", error)
            self._is_incomplete = True

    def _show(self, kind: str, text: str, step: int, epoch: float, is_line_due: bool) -> None:
        if self._progress is not None:
            self._shown[kind] = text
            self._progress.update(self._bar, description="  ".join(filter(None, self._shown.values())))
        elif is_line_due:
            self._last_line = time.monotonic()
            print(f"step {step}{self._of_total}  epoch {epoch:.2f}  {text}", file=self._console.file, flush=True)


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
