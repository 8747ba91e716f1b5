"""The summary of fine-tuning runs; nothing is trained."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from benchmarks.accuracy.finetune import FLAT, METRIC, SCRATCH, summarize_runs, tabulate

VALUES: dict[tuple[str, float], list[float]] = {
    (SCRATCH, 0.1): [4.0, 4.4],
    (SCRATCH, 0.2): [4.2, 4.6],
    (FLAT, 0.1): [3.5, 3.3],
    (FLAT, 0.2): [3.0, 3.2],
    ("decay 0.7", 0.1): [3.3, 3.3],
    ("decay 0.7", 0.2): [2.9, 3.0],
}
RUNS: list[dict[str, Any]] = [
    {"way": way, "lr": lr, "seed": seed, METRIC: value}
    for (way, lr), values in VALUES.items()
    for seed, value in enumerate(values)
]


def test_each_method_is_judged_by_its_best_rate_seed_by_seed() -> None:
    rows = summarize_runs(RUNS)
    best = {row["way"]: row for row in rows if row["is_best"]}
    assert {way: row["lr"] for way, row in best.items()} == {SCRATCH: 0.1, FLAT: 0.2, "decay 0.7": 0.2}
    gains = best["decay 0.7"]["gains"]
    assert [round(gain, 9) for gain in gains[SCRATCH]] == [1.1, 1.4]
    assert [round(gain, 9) for gain in gains[FLAT]] == [0.1, 0.2]
    assert [round(gain, 9) for gain in best[SCRATCH]["gains"][FLAT]] == [-1.0, -1.2]
    assert not any("gains" in row for row in rows if not row["is_best"])


def test_the_table_says_by_how_much() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(tabulate(summarize_runs(RUNS), 2, 100, 1500))
    line = next(line for line in out.getvalue().splitlines() if "decay 0.7, best rate" in line)
    assert "2.9500" in line
    assert "1.2500 (1.1000 to 1.4000)" in line
    assert "0.1500 (0.1000 to 0.2000)" in line
