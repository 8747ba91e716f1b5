"""What compression costs in accuracy: whole training runs of the example configs, over compressors, workers and seeds.

    python benchmarks/convergence.py --task digits --workers 4 --seeds 3

Each run is the trainer's own, on virtual workers in one process (the communicator that tests use): what is measured
here is the result, not the time. The table gives the mean over seeds, its distance from dense, and the bytes sent.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
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
from benchmarks.step_time import describe_compressor, parse_compressor  # noqa: E402
from benchmarks.training import METRIC, Task  # noqa: E402
from disttrain import compression  # noqa: E402

# What all runs share besides the config: a GPT of 0.12 M parameters on short contexts, so that 1000 steps are a minute.
COMMON = {
    Task.DIGITS: [],
    Task.TEXT: ["task.context=32", "task.width=64", "task.layers=2", "max_steps=1000"],
}
# The settings that docs/compressors.md recommends.
RECOMMENDED = {
    Task.DIGITS: [
        "dense", "fp16", "bf16", "topk:ratio=0.01", "topk:ratio=0.01,selection=estimated", "randomk:ratio=0.2",
        "threshold:ratio=0.01", "efsign", "onebit", "qsgd:bits=4", "qsgd:bits=8", "terngrad", "natural", "blockwise8",
        "blockwise4", "powersgd:rank=4", "powersgd:rank=4,alternating=true", "signsgd optimizer.lr=0.0005",
        "dgc:ratio=0.01,warmup_steps=92 optimizer.momentum=0",
    ],
    # Under Adam what is biased begins dense, for 15 % of the steps here.
    Task.TEXT: [
        "dense", "fp16", "bf16", "blockwise8", "blockwise4", "natural", "terngrad", "qsgd:bits=8", "qsgd:bits=4",
        "onebit:dense_steps=150", "efsign:block_size=64,dense_steps=150", "topk:ratio=0.01,dense_steps=150",
        "topk:ratio=0.1,dense_steps=150", "threshold:ratio=0.1,dense_steps=150", "randomk:ratio=0.2,dense_steps=150",
        "powersgd:rank=4,dense_steps=150", "powersgd:rank=16,dense_steps=150",
        "powersgd:rank=16,alternating=true,dense_steps=150",
        "signsgd optimizer.name=sgd optimizer.momentum=0.9 optimizer.lr=0.0005 clip_norm=null",
        "dgc:ratio=0.1,warmup_steps=150,masking=false optimizer.name=sgd optimizer.momentum=0 optimizer.lr=0.3",
    ],
}  # fmt: skip
DENSE: dict[str, Any] = {"compressor": {"name": "dense"}, "settings": []}


def main(
    task: Annotated[Task, typer.Option(help="Which config to train.")] = Task.DIGITS,
    workers: Annotated[list[int], typer.Option(min=1, max=64)] = [4],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    compressor: Annotated[
        list[str], typer.Option(help="Only these: dense, topk:ratio=0.01, 'signsgd optimizer.lr=0.001', ...")
    ] = [],  # noqa: B006
    setting: Annotated[list[str], typer.Option(help="Overrides for all runs: epochs=5, ...")] = [],  # noqa: B006
    earlier: Annotated[
        list[Path], typer.Option(help="A result file (.json) of the same task: its runs are taken over, not repeated.")
    ] = [],  # noqa: B006
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = os.cpu_count() or 1,
    output: Annotated[Path, typer.Option(help="Directory of the result files.")] = ROOT / "benchmarks" / "results",
) -> None:
    """Train every combination and compare with dense."""
    machine = describe_machine()
    contenders = [parse_contender(text) for text in compressor or RECOMMENDED[task]]
    if contenders[0] != DENSE:
        contenders.insert(0, DENSE)
    settings = [*COMMON[task], *setting]
    known = {identify_run(run): run for path in earlier for run in read_runs(path, settings)}
    wanted = [
        {"workers": world_size, **contender, "seed": seed}
        for world_size in workers
        for contender in contenders
        for seed in range(seeds)
    ]
    with ProcessPoolExecutor(jobs) as pool:
        futures = {
            identify_run(run): pool.submit(
                train, task.value, [*settings, *run["settings"]], run["workers"], run["compressor"], run["seed"]
            )
            for run in wanted
            if identify_run(run) not in known
        }
        runs = []
        for run in wanted:
            name = identify_run(run)
            runs.append(known[name] if name in known else {**run, **futures[name].result()})
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    rows = summarise_runs(runs, METRIC[task])
    table = make_table(rows, task.value, METRIC[task], seeds)
    show_and_write(
        table, {"machine": machine, "settings": settings, "runs": runs}, output, "convergence", task.value, width=110
    )


def parse_contender(text: str) -> dict[str, Any]:
    """A compressor and the overrides behind it, separated by spaces."""
    compressor, *settings = text.split()
    return {"compressor": parse_compressor(compressor), "settings": settings}


def identify_run(run: dict[str, Any]) -> str:
    """What tells a run from the others of a task."""
    return json.dumps([run["workers"], run["compressor"], sorted(run["settings"]), run["seed"]], sort_keys=True)


def read_runs(path: Path, settings: list[str]) -> list[dict[str, Any]]:
    """The runs of an earlier result file, made with the same ``settings``."""
    try:
        result = json.loads(path.read_text())
        if result["settings"] != settings:
            raise typer.BadParameter(f"{path} was made with other settings: {result['settings']}, not {settings}")
        return [{**DENSE, **run} for run in result["runs"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise typer.BadParameter(f"{path} is no result of this bench ({error!r})") from None


def train(task: str, settings: list[str], world_size: int, spec: dict[str, Any], seed: int) -> dict[str, Any]:
    """One run; its metrics on held-out data and the bytes of rank 0."""
    with tempfile.TemporaryDirectory() as directory:
        plain = training.load(task, directory, [f"seed={seed}", *training.ONLY_THE_END, *settings])
        config = plain.model_copy(update={"compressor": compression.Policy.build(spec)})
        summary, _ = training.train(config, world_size)
    return {"metrics": summary["metrics"], "sent_bytes": summary["wire"]["sent_bytes"], "steps": summary["steps"]}


def summarise_runs(runs: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """One row a compressor and number of workers: mean and spread over seeds, and the mean difference from dense."""
    rows = []
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for run in runs:
        contender = {key: run[key] for key in DENSE}
        found.setdefault((run["workers"], json.dumps(contender)), []).append(run)
    for (world_size, text), group in found.items():
        values = [run["metrics"][metric] for run in group]
        dense = [run["metrics"][metric] for run in found[world_size, json.dumps(DENSE)]]
        rows.append(
            {
                "workers": world_size,
                **json.loads(text),
                "mean": statistics.mean(values),
                "spread": max(values) - min(values),
                "from_dense": statistics.mean(values) - statistics.mean(dense),
                "bytes_per_step": group[0]["sent_bytes"] / group[0]["steps"],
            }
        )
    return rows


def make_table(rows: list[dict[str, Any]], task: str, metric: str, seeds: int) -> Table:
    table = Table(title=f"{task}: {metric.replace('_', ' ')}, mean of {seeds} seeds")
    for column in ("workers", "compressor"):
        table.add_column(column)
    for column in (metric.replace("_", " "), "spread", "from dense", "kB sent a step", "of dense"):
        table.add_column(column, justify="right")
    dense = {row["workers"]: row["bytes_per_step"] for row in rows if {key: row[key] for key in DENSE} == DENSE}
    for row in rows:
        name = " ".join([describe_compressor(row["compressor"]), *row["settings"]])
        sent = row["bytes_per_step"]
        figures = [f"{row['mean']:.4f}", f"{row['spread']:.4f}", f"{row['from_dense']:+.4f}", f"{sent / 1e3:.1f}"]
        share = f"{sent / dense[row['workers']]:.3f}" if dense[row["workers"]] else ""
        table.add_row(str(row["workers"]), name, *figures, share)
    return table


if __name__ == "__main__":
    typer.run(main)
