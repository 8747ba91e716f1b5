"""Growing and large batches, compared with the small batch whose accuracy they are meant to reach.

    python -m benchmarks recipe --experiment growing --task digits
    python -m benchmarks recipe --experiment large --task digits

On digits all runs of an experiment see the same number of samples; on text, runs with growing batches take half of the
steps. A run has two simulated ranks in one process and one thread, since the noise scale is estimated from the parts
of a batch. Runs execute side by side: nothing is timed.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from enum import Enum
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.accuracy.runs import (
    FINAL_EVALUATION_ONLY,
    METRIC,
    Task,
    find_metric,
    load_config,
    run_side_by_side,
    run_training,
)
from benchmarks.common.machine import describe_machine
from benchmarks.common.options import NUM_CORES, RESULTS, JobsOption, OutputOption, SeedsOption
from benchmarks.common.results import make_table, write_result
from benchmarks.common.statistics import Run, summarize_seeds

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

# Overrides for all runs of an experiment, and the cases that are compared. The first case is the baseline.
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
            "noise scale, share 0.5": [
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
            "noise scale, share 4": [
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
    (Experiment.LARGE, Task.TEXT): (  # a GPT of 7,400 parameters, which about a million samples train to convergence
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
    task: Annotated[Task, typer.Option(help="The config to train.")] = Task.DIGITS,
    seeds: SeedsOption = 3,
    setting: Annotated[list[str], typer.Option(help="Overrides for all runs: epochs=5, ...")] = [],  # noqa: B006
    jobs: JobsOption = NUM_CORES,
    output: OutputOption = RESULTS,
) -> None:
    """Train every case with every seed and compare with the first case."""
    machine = describe_machine()
    common, cases = EXPERIMENTS[experiment, task]
    calls = [
        ({"setting": name, "seed": seed}, (task.value, [*common, *overrides, f"seed={seed}", *setting]))
        for name, overrides in cases.items()
        for seed in range(seeds)
    ]
    runs = run_side_by_side(train, calls, jobs)
    rows = summarize_runs(runs, METRIC[task])
    table = tabulate(rows, f"{task.value}: {METRIC[task].replace('_', ' ')}, mean of {seeds} seeds")
    result = {"machine": machine, "common": common, "cases": cases, "runs": runs, "rows": rows}
    write_result(table, result, output, "recipe", f"{experiment.value}-{task.value}", width=110)


def train(task: str, settings: Sequence[str]) -> dict[str, Any]:
    """Train one run and return its held-out metrics, optimizer steps, samples and last batch size."""
    diverging = "health.max_skipped=null"  # a run that diverges is a result too
    with tempfile.TemporaryDirectory() as directory:
        settings = [*FINAL_EVALUATION_ONLY, diverging, "compressor.name=dense", *settings]
        summary, trainer = run_training(load_config(task, directory, settings), WORLD_SIZE)
    return {
        "metrics": summary["metrics"],
        "steps": summary["steps"],
        "samples": trainer.progress.samples,
        "last_batch_size": trainer.batch.batch_size,
    }


def summarize_runs(runs: Sequence[Run], metric: str) -> list[dict[str, Any]]:
    """Return one row for each case: mean and spread over seeds, and steps and mean compared with the first case."""
    rows: list[dict[str, Any]] = []
    groups = summarize_seeds(runs, key=lambda run: run["setting"], metric=lambda run: run["metrics"][metric])
    for setting, group in groups.items():
        row = {
            "setting": setting,
            "samples": group.runs[0]["samples"],
            "steps": statistics.mean(run["steps"] for run in group.runs),
            "last_batch_size": max(run["last_batch_size"] for run in group.runs),
            "mean": group.mean,
            "spread": group.spread,
        }
        first = rows[0] if rows else row
        rows.append({**row, "share": row["steps"] / first["steps"], "difference": row["mean"] - first["mean"]})
    return rows


def tabulate(rows: Sequence[dict[str, Any]], title: str) -> Table:
    return make_table(
        title,
        ("setting",),
        ("last batch", "steps", "of the first", "mean", "spread", "from the first"),
        (
            (
                row["setting"],
                str(row["last_batch_size"]),
                f"{row['steps']:.0f}",
                f"{row['share']:.2f}",
                f"{row['mean']:.4f}",
                f"{row['spread']:.4f}",
                f"{row['difference']:+.4f}",
            )
            for row in rows
        ),
    )


def summarize_result(result: dict[str, Any]) -> str:
    """Return the baseline, and steps and difference of the case closest to it or better."""
    metric = find_metric(result["runs"][0])
    first, *others = result["rows"]
    better = max if metric == METRIC[Task.DIGITS] else min
    best = better(others, key=lambda row: row["mean"])
    return (
        f"{metric.replace('_', ' ')}: {first['setting']} {first['mean']:.4f}; "
        f"best of {len(others)} others {best['difference']:+.4f} "
        f"({best['setting']}) in {best['share']:.2f} of the steps"
    )
