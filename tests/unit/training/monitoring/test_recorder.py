from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from disttrain.training.monitoring.display import Display
from disttrain.training.monitoring.recorder import Recorder
from disttrain.training.monitoring.trackers import JSONLines, TensorBoard, Tracker

RECORD = {"epoch": 0.5, "loss": 1.25, "samples_per_second": 321.0}
SUMMARY: dict[str, Any] = {
    "engine": "torch",
    "world_size": 2,
    "steps": 4,
    "epochs": 2.0,
    "seconds": 1.5,
    "samples_per_second": 1000.0,
    "metrics": {"bits_per_byte": 2.5},
    "wire": {"sent_bytes": 2**20, "received_bytes": 0, "dense_bytes": 10 * 2**20},
    "skipped_steps": 0,
    "ended_by": "last_step",
}


def record(directory: Path, console: Console, step: int = 0) -> str:
    recorder = Recorder(
        [JSONLines(directory, step), TensorBoard(directory, step), Display(console, directory, step, 4)]
    )
    for done in range(step + 1, 5):
        recorder.show_position(done)
        recorder.log_training(done, RECORD)
        recorder.log_evaluation(done, {"epoch": 0.5, "bits_per_byte": 2.5})
    recorder.finish(SUMMARY)
    recorder.close()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_full_disk_costs_records_but_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = JSONLines(tmp_path, 0)
    tracker._file.close()
    tracker._file = open("/dev/full", "a")  # noqa: SIM115
    recorder = Recorder([tracker])
    for step in (1, 2):
        recorder.log_training(step, RECORD)
    recorder.finish(SUMMARY)
    recorder.close()
    assert caplog.text.count("records are lost, and the run continues: [Errno 28] No space left on device") == 1


def test_damaged_records_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tr\n[]\n{"step": null}\n')
    JSONLines(tmp_path, 3).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"kind": "train", "step": 1}\n'


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    shown = record(tmp_path, Console(file=io.StringIO(), force_terminal=True, width=150))
    assert "4/4" in shown
    assert "loss 1.2500  321 samples/s  held-out bits_per_byte 2.5000" in shown


def test_anything_else_gets_lines(tmp_path: Path) -> None:
    lines = record(tmp_path, Console(file=io.StringIO())).splitlines()
    assert lines[:4] == [f"step {step}/4  epoch 0.50  held-out bits_per_byte 2.5000" for step in range(1, 5)]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_table_says_what_compression_saved(tmp_path: Path, is_terminal: bool) -> None:
    shown = record(tmp_path, Console(file=io.StringIO(), force_terminal=is_terminal, width=100, color_system=None))
    rows = dict(
        [cell.strip() for cell in line.strip("│ ").split("│")] for line in shown.splitlines() if line.startswith("│")
    )
    assert rows == {
        "held-out bits per byte": "2.5000",
        "steps": "4 (2 epochs)",
        "workers": "2 (torch)",
        "seconds": "1.5",
        "samples/s": "1000",
        "bytes sent per worker": "1.0 MiB",
        "bytes if dense fp32": "10.0 MiB",
        "ratio": "10.0x less",
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == SUMMARY


def test_records_beyond_the_checkpoint_are_written_once(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    record(tmp_path, console)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"kind": "train", "st')  # a killed run's last words
    record(tmp_path, console, step=2)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["step"] for entry in records if entry["kind"] == "train"] == [1, 2, 3, 4]
    assert records[0] == {"kind": "train", "step": 1, **RECORD}


def test_a_tracker_that_fails_costs_its_own_records_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Down(Tracker):
        def log(self, kind: str, step: int, record: Any) -> None:
            raise ConnectionError("no server")

        def finish(self, summary: Any) -> None:
            raise RuntimeError("no server either")

    class Listening(Tracker):
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def log(self, kind: str, step: int, record: Any) -> None:
            self.heard.append((kind, step))

        def close(self) -> None:
            self.heard.append("closed")

    listening = Listening()
    recorder = Recorder([Down(), listening])
    recorder.log_training(1, RECORD)
    recorder.log_event(1, {"event": "loss", "loss": "nan"})
    recorder.finish(SUMMARY)
    recorder.close()
    assert listening.heard == [("train", 1), ("event", 1), "closed"]
    assert caplog.text.count("Down: records are lost, and the run continues: no server") == 1
