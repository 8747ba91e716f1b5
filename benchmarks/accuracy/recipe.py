"""What the recipe is for: growing batches and large ones, against the small batch that they are to be as good as.

    python benchmarks/recipe.py --experiment growing --task digits
    python benchmarks/recipe.py --experiment large --task digits

On digits all runs of an experiment see equally many samples; on text those that grow take half of the steps. A run is
two virtual ranks in one process and one thread, so that there are parts of a batch to measure noise by; runs go side by
side, since nothing is timed.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import training  # noqa: E402
from benchmarks.machine import describe_machine, show_and_write  # noqa: E402
from benchmarks.training import METRIC, Task  # noqa: E402

WORLD_SIZE = 2


class Experiment(str, Enum):
    GROWING = "growing"
    LARGE = "large"


LARS = [
    "optimizer.name=lars", "optimizer.lr=0.4", "optimizer.trust_coefficient=0.2", "optimizer.momentum=0.8",
    "optimizer.weight_decay=1e-4",
]  # fmt: skip
SGD = ["optimizer.name=sgd", "optimizer.momentum=0.9"]
LAMB_ON_TEXT = [
    "optimizer.name=lamb", "optimizer.lr=0.03", "optimizer.betas=[0.9,0.99]", "optimizer.weight_decay=0.01",
    "schedule.warmup_steps=20",
]  # fmt: skip

# What all runs of an experiment share, and the settings that are compared: the first is what the others are to reach.
Cases = dict[str, list[str]]
EXPERIMENTS: dict[tuple[Experiment, Task], tuple[list[str], Cases]] = {
    (Experiment.GROWING, Task.DIGITS): (
        ["epochs=30", "batch_size=16", "optimizer.lr=0.02"],
        {
            "batch 16": [],
            "schedule: x3 at epochs 5, 10, 15": [
                "batch.name=schedule", "batch.milestones=[5,10,15]", "batch.factor=3", "batch.lr_scaling=sqrt",
                "batch.max_batch_size=256",
            ],
            "plateau: x2 at factor 0.9": ["batch.name=plateau", "batch.max_batch_size=256"],
            "noise scale, half of it": [
                "batch.name=noise_scale", "batch.share=0.5", "batch.lr_scaling=sqrt", "batch.max_batch_size=256",
            ],
        },
    ),
    (Experiment.GROWING, Task.TEXT): (
        ["max_steps=600", "batch_size=16"],
        {
            "batch 16": [],
            "schedule: x2 at steps 60, 120, 180": [
                "max_steps=300", "batch.name=schedule", "batch.unit=step", "batch.milestones=[60,120,180]",
                "batch.factor=2", "batch.max_batch_size=128",
            ],
            "noise scale, four times it": [
                "max_steps=300", "batch.name=noise_scale", "batch.share=4", "batch.lr_scaling=sqrt",
                "batch.max_batch_size=128",
            ],
        },
    ),
    (Experiment.LARGE, Task.DIGITS): (
        ["epochs=40", "schedule.warmup_steps=10", "batch_size=1024"],
        {
            "batch 64, sgd": ["batch_size=64"],
            "batch 1024, sgd, lr 0.05": [],
            "batch 1024, sgd, lr 0.1": ["optimizer.lr=0.1"],
            "batch 1024, sgd, lr 0.2": ["optimizer.lr=0.2"],
            "batch 1024, sgd, lr 0.8 (linear)": ["optimizer.lr=0.8"],
            "batch 1024, lars, polynomial": [*LARS, "schedule.name=polynomial", "schedule.warmup_steps=20"],
            "batch 1024, lars, linear": [*LARS, "schedule.name=linear", "schedule.warmup_steps=5"],
            "batch 1024, lamb, lr 0.05": ["optimizer.name=lamb", "optimizer.lr=0.05", "optimizer.weight_decay=0.01"],
        },
    ),
    (Experiment.LARGE, Task.TEXT): (  # a GPT of 7 400 parameters: what some million samples train to the end
        [
            "task.context=3", "task.width=16", "task.layers=1", "max_steps=800", "batch_size=1024",
            "schedule.warmup_steps=60", "schedule.final_lr_factor=0",
        ],
        {
            "batch 64, sgd, lr 0.3": [
                *SGD, "optimizer.lr=0.3", "batch_size=64", "max_steps=12800", "schedule.warmup_steps=100",
            ],
            "batch 1024, sgd, lr 0.3": [*SGD, "optimizer.lr=0.3"],
            "batch 1024, sgd, lr 1": [*SGD, "optimizer.lr=1"],
            "batch 1024, lamb, lr 0.03": LAMB_ON_TEXT,
            "batch 1024, lamb, twice the samples": [*LAMB_ON_TEXT, "max_steps=1600"],
        },
    ),
}  # fmt: skip


def main(
    experiment: Annotated[Experiment, typer.Option(help="Batches that grow, or that are large from the start.")],
    task: Annotated[Task, typer.Option(help="Which config to train.")] = Task.DIGITS,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    setting: Annotated[list[str], typer.Option(help="Overrides for all runs: epochs=5, ...")] = [],  # noqa: B006
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = os.cpu_count() or 1,
    output: Annotated[Path, typer.Option(help="Directory of the result files.")] = ROOT / "benchmarks" / "results",
) -> None:
    """Train every setting with every seed and compare with the first setting."""
    if (experiment, task) not in EXPERIMENTS:
        raise typer.BadParameter(f"there is no experiment {experiment.value!r} on {task.value!r}")
    machine = describe_machine()
    common, cases = EXPERIMENTS[experiment, task]
    combinations = [(name, seed) for name in cases for seed in range(seeds)]
    with ProcessPoolExecutor(jobs) as pool:
        futures = [
            pool.submit(train, task.value, [*common, *cases[name], f"seed={seed}", *setting])
            for name, seed in combinations
        ]
        runs = []
        for (name, seed), future in zip(combinations, futures, strict=True):
            runs.append({"setting": name, "seed": seed, **future.result()})
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    rows = summarise_runs(runs, METRIC[task])
    table = make_table(rows, f"{task.value}: {METRIC[task].replace('_', ' ')}, mean of {seeds} seeds")
    result = {"machine": machine, "common": common, "cases": cases, "runs": runs, "rows": rows}
    show_and_write(table, result, output, f"recipe-{experiment.value}", task.value, width=110)


def train(task: str, settings: Sequence[str]) -> dict[str, Any]:
    """One run: its metrics on held-out data, optimizer steps, samples and last batch size."""
    quiet = [*training.ONLY_THE_END, "health.max_skipped=null"]  # what diverges is a result too
    with tempfile.TemporaryDirectory() as directory:
        config = training.load(task, directory, [*quiet, "compressor.name=dense", *settings])
        summary, trainer = training.train(config, WORLD_SIZE)
    return {
        "metrics": summary["metrics"],
        "steps": summary["steps"],
        "samples": trainer.progress.samples,
        "last_batch_size": trainer.batch.batch_size,
    }


def summarise_runs(runs: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """One row a setting: means over seeds, the spread, and how it compares with the first setting."""
    rows: list[dict[str, Any]] = []
    for setting in dict.fromkeys(run["setting"] for run in runs):
        group = [run for run in runs if run["setting"] == setting]
        values = [run["metrics"][metric] for run in group]
        row = {
            "setting": setting,
            "samples": group[0]["samples"],
            "steps": statistics.mean(run["steps"] for run in group),
            "last_batch_size": max(run["last_batch_size"] for run in group),
            "mean": statistics.mean(values),
            "spread": max(values) - min(values),
        }
        first = rows[0] if rows else row
        rows.append({**row, "share": row["steps"] / first["steps"], "difference": row["mean"] - first["mean"]})
    return rows


def make_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    table.add_column("setting")
    for column in ("last batch", "steps", "of the first", "mean", "spread", "from the first"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = [f"{row['steps']:.0f}", f"{row['share']:.2f}", f"{row['mean']:.4f}", f"{row['spread']:.4f}"]
        table.add_row(row["setting"], str(row["last_batch_size"]), *figures, f"{row['difference']:+.4f}")
    return table


if __name__ == "__main__":
    typer.run(main)
