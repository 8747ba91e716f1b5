"""Fine-tuning compared with training from scratch, with one learning rate and with rates that decay by layer.

    python -m benchmarks finetune --seeds 3

For each seed, configs/text.yaml is trained first. Then configs/text-finetune.yaml runs with each method and learning
rate, for the same number of steps on the same batches. Each method is judged by its best learning rate. A run is one
process with one thread.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.accuracy.runs import load_config, run_side_by_side, run_training
from benchmarks.common.machine import describe_machine
from benchmarks.common.options import NUM_CORES, RESULTS, JobsOption, OutputOption, SeedsOption
from benchmarks.common.results import make_table, write_result
from benchmarks.common.statistics import Run, summarize_seeds

METRIC = "bits_per_byte"
SCRATCH, FLAT = "from scratch", "one rate"
RATES = [1.5e-3, 3e-3, 6e-3, 12e-3]


def main(
    seeds: SeedsOption = 3,
    rate: Annotated[list[float], typer.Option(help="Learning rates to try with each method.")] = RATES,
    decay: Annotated[list[float], typer.Option(help="Factors of the rate from a layer to the one below it.")] = [0.7],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1, help="Of fine-tuning, and of training from scratch.")] = 100,
    pretraining: Annotated[int, typer.Option(min=1, help="Steps on the first text.")] = 1500,
    setting: Annotated[list[str], typer.Option(help="Overrides for all fine-tuning runs.")] = [],  # noqa: B006
    jobs: JobsOption = NUM_CORES,
    output: OutputOption = RESULTS,
) -> None:
    """Train with every method and rate, and compare each method's best rate."""
    machine = describe_machine()
    methods = {SCRATCH: ["start_from=null", "layers.decay=1"], FLAT: ["layers.decay=1"]}
    methods |= {f"decay {factor:g}": [f"layers.decay={factor}"] for factor in decay}
    with tempfile.TemporaryDirectory() as directory:
        keep_checkpoint = ["checkpoint.every_epochs=1000000"]
        calls: list[tuple[Run, tuple[Any, ...]]] = [
            ({"seed": seed}, ("text", directory, f"text-{seed}", seed, pretraining, keep_checkpoint))
            for seed in range(seeds)
        ]
        pretrained = run_side_by_side(train, calls, jobs)
        calls = []
        for method, overrides in methods.items():
            for lr in rate:
                for seed in range(seeds):
                    weights = [f"start_from.weights={directory}/text-{seed}"] if method != SCRATCH else []
                    settings = [f"optimizer.lr={lr}", *weights, *overrides, *setting]
                    name = f"{method.replace(' ', '-')}-{lr}-{seed}"
                    arguments = ("text-finetune", directory, name, seed, steps, settings)
                    calls.append(({"way": method, "lr": lr, "seed": seed}, arguments))
        runs = run_side_by_side(train, calls, jobs)
    rows = summarize_runs(runs)
    result = {"machine": machine, "pretraining": [run[METRIC] for run in pretrained], "runs": runs, "rows": rows}
    write_result(tabulate(rows, seeds, steps, pretraining), result, output, "finetune")


def train(config: str, directory: str, name: str, seed: int, steps: int, settings: Sequence[str]) -> dict[str, Any]:
    """Train one run and return its bits per byte on held-out text."""
    own = [f"name={name}", f"seed={seed}", f"max_steps={steps}", f"schedule.warmup_steps={min(steps // 10, 100)}"]
    quiet = ["checkpoint.every_steps=null", "evaluation.every_steps=null", "compressor.name=dense"]
    summary, _ = run_training(load_config(config, directory, [*quiet, *own, *settings]), world_size=1)
    return {METRIC: float(summary["metrics"][METRIC])}


def summarize_runs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return one row for each method and learning rate.

    ``is_best`` marks each method's best rate. Only these rows have ``gains``: for each baseline the differences to its
    best rate, seed by seed.
    """
    groups = summarize_seeds(runs, key=lambda run: (run["way"], run["lr"]), metric=lambda run: float(run[METRIC]))
    rows: list[dict[str, Any]] = [
        {"way": method, "lr": lr, "values": group.values, "mean": group.mean, "is_best": False}
        for (method, lr), group in groups.items()
    ]
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["way"] not in best or row["mean"] < best[row["way"]]["mean"]:
            best[row["way"]] = row
    for method, row in best.items():
        row["is_best"] = True
        row["gains"] = {
            other: [theirs - ours for theirs, ours in zip(best[other]["values"], row["values"], strict=True)]
            for other in (SCRATCH, FLAT)
            if other != method
        }
    return rows


def tabulate(rows: Sequence[dict[str, Any]], seeds: int, steps: int, pretraining: int) -> Table:
    return make_table(
        f"bits per byte after {steps} steps, mean of {seeds} seeds; pre-trained for {pretraining} steps",
        ("way",),
        ("rate", "bits per byte", "spread", "gain over scratch", f"gain over {FLAT}"),
        (
            (
                f"{row['way']}, best rate" if row["is_best"] else row["way"],
                f"{row['lr']:g}",
                f"{row['mean']:.4f}",
                f"{max(row['values']) - min(row['values']):.4f}",
                *(_format_gain(row.get("gains", {}).get(other)) for other in (SCRATCH, FLAT)),
            )
            for row in rows
        ),
    )


def summarize_result(result: dict[str, Any]) -> str:
    """Return bits per byte of each method with its best learning rate."""
    best = [row for row in result["rows"] if row["is_best"]]
    return "bits per byte: " + ", ".join(f"{row['mean']:.4f} {row['way']} (rate {row['lr']:g})" for row in best)


def _format_gain(values: Sequence[float] | None) -> str:
    """Return the mean over seeds, with the smallest and the largest value."""
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})" if values else ""
