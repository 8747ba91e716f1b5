"""The benchmarks that start workers, with small settings: they run to their end and write what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def run(command: str, output: Path) -> dict[str, Any]:
    """Run a benchmark with two workers and return its result."""
    arguments = [*command.split(), "--rate", "none", "--workers", "2", "--turns", "2", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = output.glob("*/*.json")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_step_time_with_adamw(tmp_path: Path) -> None:
    result = run("step-time --model mlp --optimizer adamw --steps 1 --compressor dense --compressor efsign", tmp_path)
    assert result["settings"]["optimizer"] == "adamw"
    assert [row["who"] for row in result["rows"]] == ["ddp", "disttrain", "disttrain"]
    assert all(row["milliseconds"] > 0 for row in result["rows"])


def test_time_to_loss(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("what is trained on. " * 400)
    sizes = "--width 8 --layers 1 --context 8 --batch-size 4 --steps 12 --lr 0.01 --lr-warmup 2 --evaluate-every 4"
    compressor = 'efsign:dense_as=bf16,whiten={"warmup_steps":4,"refresh_growth":1}'
    settings = f"--compressor {compressor} --hook powersgd:rank=1,start=3 --timed-steps 1 --jobs 1"
    files = f"--text {tmp_path / 'text.txt'} --curves {tmp_path / 'curves.json'}"
    result = run(f"time-to-loss {sizes} {settings} {files}", tmp_path / "results")
    runs = {(run["mode"], run["who"], run["setting"]["name"]): run for run in result["runs"]}
    names = [("ddp", "none"), ("ddp", "powersgd"), ("disttrain", "dense"), ("disttrain", "efsign")]
    assert list(runs) == [(mode, *name) for mode in ("real", "composed") for name in names]
    for its in runs.values():
        seconds = [second for _, second, _ in its["evaluations"]]
        assert len(set(seconds)) == 4
        assert seconds == sorted(seconds)
        kinds = [kind for _, kind in its["kinds"]]
        assert kinds[0] == "dense"
        more = {"none": [], "dense": [], "powersgd": ["compressed"], "efsign": ["compressed", "refresh"]}
        assert sorted({*kinds[1:]} - {"dense"}) == more[its["setting"]["name"]]
    # Simulated workers learn what processes learn, and both frameworks the same: to float32's rounding, which
    # Adam amplifies where gradients are tiny.
    for name in names:
        real, composed = ([loss for *_, loss in runs[(mode, *name)]["evaluations"]] for mode in ("real", "composed"))
        assert real == pytest.approx(composed, abs=0.01)
        assert real[-1] < real[0] - 0.2
    ours, theirs = (runs[("real", *names[index])]["evaluations"][-1][-1] for index in (2, 0))
    assert ours == pytest.approx(theirs, abs=0.01)
    assert all(row["ratio"] > 0 for row in result["rows"] if row["setting"]["name"] in ("none", "dense"))
    assert len(json.loads((tmp_path / "curves.json").read_text())["curves"]) == 3
