"""What fine-tuning gains on the example: from scratch, with one rate for all layers, with rates that decay by layer.

    python benchmarks/finetune.py --seeds 3

For every seed configs/text.yaml is trained first. Then configs/text-finetune.yaml runs for each way and each rate, all
for equally many steps on the same batches, and each way is judged by its best rate. One process and one thread a run.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import training  # noqa: E402
from benchmarks.machine import describe_machine, show_and_write  # noqa: E402

METRIC = "bits_per_byte"
SCRATCH, FLAT = "from scratch", "one rate"
RATES = [1.5e-3, 3e-3, 6e-3, 12e-3]


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    rate: Annotated[list[float], typer.Option(help="Rates that every way is tried with.")] = RATES,
    decay: Annotated[list[float], typer.Option(help="Factors of the rate from a layer to the one before it.")] = [0.7],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1, help="Of fine-tuning, and of training from scratch.")] = 100,
    pretraining: Annotated[int, typer.Option(min=1, help="Steps on the first text.")] = 1500,
    setting: Annotated[list[str], typer.Option(help="Overrides for all fine-tuning runs.")] = [],  # noqa: B006
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = os.cpu_count() or 1,
    output: Annotated[Path, typer.Option(help="Directory of the result files.")] = ROOT / "benchmarks" / "results",
) -> None:
    """Train every combination and compare each way's best rate."""
    machine = describe_machine()
    ways = {SCRATCH: ["start_from=null", "layers.decay=1"], FLAT: ["layers.decay=1"]}
    ways |= {f"decay {factor:g}": [f"layers.decay={factor}"] for factor in decay}
    combinations = [(way, lr, seed) for way in ways for lr in rate for seed in range(seeds)]
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(jobs) as pool:
        first = [
            pool.submit(
                train, "text", directory, f"text-{seed}", seed, pretraining, ["checkpoint.every_epochs=1000000"]
            )
            for seed in range(seeds)
        ]
        before = [future.result() for future in first]
        print(json.dumps({"pretraining": before}), file=sys.stderr, flush=True)
        futures = []
        for way, lr, seed in combinations:
            weights = [f"start_from.weights={directory}/text-{seed}"] if way != SCRATCH else []
            settings = [f"optimizer.lr={lr}", *weights, *ways[way], *setting]
            name = f"{way.replace(' ', '-')}-{lr}-{seed}"
            futures.append(pool.submit(train, "text-finetune", directory, name, seed, steps, settings))
        runs = []
        for (way, lr, seed), future in zip(combinations, futures, strict=True):
            runs.append({"way": way, "lr": lr, "seed": seed, METRIC: future.result()})
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    rows = summarise_runs(runs)
    table = make_table(rows, seeds, steps, pretraining)
    result = {"machine": machine, "pretraining": before, "runs": runs, "rows": rows}
    show_and_write(table, result, output, "finetune")


def train(config: str, directory: str, name: str, seed: int, steps: int, settings: Sequence[str]) -> float:
    """One run; bits a byte on its held-out text at the end."""
    own = [f"name={name}", f"seed={seed}", f"max_steps={steps}", f"schedule.warmup_steps={min(steps // 10, 100)}"]
    quiet = ["checkpoint.every_steps=null", "evaluation.every_steps=null", "compressor.name=dense"]
    summary, _ = training.train(training.load(config, directory, [*quiet, *own, *settings]), world_size=1)
    return float(summary["metrics"][METRIC])


def summarise_runs(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a way and rate; ``is_best`` marks each way's best rate, ``gains`` are those of its seeds over others'."""
    rows = []
    for way in dict.fromkeys(run["way"] for run in runs):
        own = []
        for lr in dict.fromkeys(run["lr"] for run in runs):
            values = [run[METRIC] for run in runs if (run["way"], run["lr"]) == (way, lr)]
            own.append({"way": way, "lr": lr, "values": values, "mean": statistics.mean(values), "is_best": False})
        min(own, key=lambda row: row["mean"])["is_best"] = True
        rows += own
    best = {row["way"]: row["values"] for row in rows if row["is_best"]}
    for row in rows:
        if row["is_best"]:
            row["gains"] = {
                other: [theirs - ours for theirs, ours in zip(best[other], row["values"], strict=True)]
                for other in (SCRATCH, FLAT)
                if other != row["way"]
            }
    return rows


def make_table(rows: Sequence[dict[str, Any]], seeds: int, steps: int, pretraining: int) -> Table:
    title = f"bits a byte after {steps} steps, mean of {seeds} seeds; pre-trained for {pretraining} steps"
    table = Table(title=title)
    table.add_column("way")
    for column in ("rate", "bits a byte", "spread", f"gain on {SCRATCH}", f"gain on {FLAT}"):
        table.add_column(column, justify="right")
    for row in rows:
        spread = max(row["values"]) - min(row["values"])
        name = f"{row['way']}, best rate" if row["is_best"] else row["way"]
        gains = [_gain(row.get("gains", {}).get(other)) for other in (SCRATCH, FLAT)]
        table.add_row(name, f"{row['lr']:g}", f"{row['mean']:.4f}", f"{spread:.4f}", *gains)
    return table


def _gain(values: Sequence[float] | None) -> str:
    """The mean and, for every seed alike, the least and the most."""
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})" if values else ""


if __name__ == "__main__":
    typer.run(main)
