"""Accuracy under compression: whole training runs of the example configs with each compressor, compared with dense.

    python -m benchmarks convergence --task digits --workers 4 --seeds 3

Runs use the trainer with simulated workers in one process, so results are measured but not time. The table gives the
mean over seeds, the difference from dense and the bytes sent.
"""

from __future__ import annotations

import json
import tempfile
from enum import Enum
from pathlib import Path
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
from benchmarks.common.options import (
    NUM_CORES,
    RESULTS,
    JobsOption,
    OutputOption,
    SeedsOption,
    describe_compressor,
    parse_compressor,
)
from benchmarks.common.results import make_table, write_result
from benchmarks.common.statistics import Run, summarize_seeds
from disttrain import compression


class Study(str, Enum):
    DIGITS = "digits"
    DIGITS_ADAMW = "digits-adamw"
    TEXT = "text"
    TEXT_LARGE = "text-large"


# The task of a study, which is also the name of its config.
TASKS = {
    Study.DIGITS: Task.DIGITS,
    Study.DIGITS_ADAMW: Task.DIGITS,
    Study.TEXT: Task.TEXT,
    Study.TEXT_LARGE: Task.TEXT,
}
# Overrides for all runs. text: a GPT of 0.12 M parameters with short contexts, so that 1000 steps take a minute.
# digits-adamw: rates from 0.002 to 0.01 are as accurate as SGD, 0.001 is a point below. text-large: 3.2 M parameters.
COMMON = {
    Study.DIGITS: [],
    Study.DIGITS_ADAMW: ["optimizer.name=adamw", "optimizer.lr=0.004"],
    Study.TEXT: ["task.context=32", "task.width=64", "task.layers=2", "max_steps=1000"],
    Study.TEXT_LARGE: ["task.context=32", "task.width=256", "task.layers=4", "max_steps=3000", "optimizer.lr=0.001"],
}


def recommend_for_adam(dense_steps: int) -> list[str]:
    """Return the compressors for Adam. Biased ones start with dense steps; those that are whitened need fewer."""
    biased = [
        "onebit", "efsign:block_size=64", "topk:ratio=0.01", "topk:ratio=0.1", "threshold:ratio=0.1",
        "randomk:ratio=0.2", "powersgd:rank=4", "powersgd:rank=16", "powersgd:rank=16,alternating=true",
    ]  # fmt: skip
    whitened = ["efsign:block_size=256,mean_bits=4", "powersgd:rank=8", "topk:ratio=0.04,chunk_size=4096,value_bits=4"]
    return [
        "dense", "fp16", "bf16", "blockwise8", "blockwise4", "natural", "terngrad", "qsgd:bits=8", "qsgd:bits=4",
        *(f"{text}{',' if ':' in text else ':'}dense_steps={dense_steps}" for text in biased),
        *(f"{text},whiten=true,dense_steps={min(dense_steps, 150)},dense_as=bf16" for text in whitened),
    ]  # fmt: skip


# The compressors that docs/compressors.md recommends, each followed by its overrides. Dense steps are 15 % of all.
RECOMMENDED = {
    Study.DIGITS: [
        "dense", "fp16", "bf16", "topk:ratio=0.01", "topk:ratio=0.01,selection=estimated", "randomk:ratio=0.2",
        "threshold:ratio=0.01", "efsign", "onebit", "qsgd:bits=4", "qsgd:bits=8", "terngrad", "natural", "blockwise8",
        "blockwise4", "powersgd:rank=4", "powersgd:rank=4,alternating=true", "signsgd optimizer.lr=0.0005",
        "dgc:ratio=0.01,warmup_steps=92 optimizer.momentum=0",
    ],
    Study.DIGITS_ADAMW: recommend_for_adam(dense_steps=69),
    Study.TEXT: [
        *recommend_for_adam(dense_steps=150),
        "signsgd optimizer.name=sgd optimizer.momentum=0.9 optimizer.lr=0.0005 clip_norm=null",
        "dgc:ratio=0.1,warmup_steps=150,masking=false optimizer.name=sgd optimizer.momentum=0 optimizer.lr=0.3",
    ],
    Study.TEXT_LARGE: recommend_for_adam(dense_steps=450),
}  # fmt: skip
DENSE: dict[str, Any] = {"compressor": {"name": "dense"}, "settings": []}


def main(
    task: Annotated[
        Study, typer.Option(help="A config, or a variant: digits with AdamW, text with 3.2 M parameters.")
    ] = Study.DIGITS,
    workers: Annotated[list[int], typer.Option(min=1, max=64)] = [4],  # noqa: B006
    seeds: SeedsOption = 3,
    compressor: Annotated[
        list[str], typer.Option(help="Only these: dense, topk:ratio=0.01, 'signsgd optimizer.lr=0.001', ...")
    ] = [],  # noqa: B006
    setting: Annotated[list[str], typer.Option(help="Overrides for all runs: epochs=5, ...")] = [],  # noqa: B006
    earlier: Annotated[
        list[Path], typer.Option(help="A result file (.json) of the same task; its runs are reused, not repeated.")
    ] = [],  # noqa: B006
    jobs: JobsOption = NUM_CORES,
    output: OutputOption = RESULTS,
) -> None:
    """Train with every compressor and compare with dense."""
    machine = describe_machine()
    variants = [parse_variant(text) for text in compressor or RECOMMENDED[task]]
    if variants[0] != DENSE:
        variants.insert(0, DENSE)
    settings = [*COMMON[task], *setting]
    finished = {identify_run(run): run for path in earlier for run in read_runs(path, settings)}
    wanted: list[Run] = [
        {"workers": world_size, **variant, "seed": seed}
        for world_size in workers
        for variant in variants
        for seed in range(seeds)
    ]
    calls = [
        (run, (TASKS[task].value, [*settings, *run["settings"]], run["workers"], run["compressor"], run["seed"]))
        for run in wanted
        if identify_run(run) not in finished
    ]
    finished |= {identify_run(run): run for run in run_side_by_side(train, calls, jobs)}
    runs = [finished[identify_run(run)] for run in wanted]
    metric = METRIC[TASKS[task]]
    table = tabulate(summarize_runs(runs, metric), task.value, metric, seeds)
    result = {"machine": machine, "task": task.value, "settings": settings, "runs": runs}
    write_result(table, result, output, "convergence", task.value, width=110)


def parse_variant(text: str) -> dict[str, Any]:
    """Parse a compressor followed by overrides, separated by spaces."""
    compressor, *settings = text.split()
    return {"compressor": parse_compressor(compressor), "settings": settings}


def identify_run(run: Run) -> str:
    """Return a key that is unique among the runs of a task."""
    return json.dumps([run["workers"], run["compressor"], sorted(run["settings"]), run["seed"]], sort_keys=True)


def read_runs(path: Path, settings: list[str]) -> list[Run]:
    """Read the runs of an earlier result file, which must have been made with the same ``settings``."""
    try:
        result = json.loads(path.read_text())
        if result["settings"] != settings:
            raise typer.BadParameter(f"{path} was made with the settings {result['settings']}, not {settings}")
        return [{**DENSE, **run} for run in result["runs"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise typer.BadParameter(f"{path} is not a result of this benchmark ({error!r})") from None


def train(task: str, settings: list[str], world_size: int, spec: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train one run and return its held-out metrics and the bytes that rank 0 sent."""
    with tempfile.TemporaryDirectory() as directory:
        config = load_config(task, directory, [f"seed={seed}", *FINAL_EVALUATION_ONLY, *settings])
        config = config.model_copy(update={"compressor": compression.Policy.build(spec)})
        summary, _ = run_training(config, world_size)
    return {"metrics": summary["metrics"], "sent_bytes": summary["wire"]["sent_bytes"], "steps": summary["steps"]}


def summarize_runs(runs: list[Run], metric: str) -> list[dict[str, Any]]:
    """Return one row for each number of workers and variant: mean, spread, difference from dense, bytes per step."""
    groups = summarize_seeds(
        runs,
        key=lambda run: (run["workers"], json.dumps({name: run.get(name, DENSE[name]) for name in DENSE})),
        metric=lambda run: run["metrics"][metric],
    )
    return [
        {
            "workers": world_size,
            **json.loads(variant),
            "mean": group.mean,
            "spread": group.spread,
            "from_dense": group.mean - groups[world_size, json.dumps(DENSE)].mean,
            "bytes_per_step": group.runs[0]["sent_bytes"] / group.runs[0]["steps"],
        }
        for (world_size, variant), group in groups.items()
    ]


def tabulate(rows: list[dict[str, Any]], task: str, metric: str, seeds: int) -> Table:
    name = metric.replace("_", " ")
    dense = {row["workers"]: row["bytes_per_step"] for row in rows if _is_dense(row)}
    return make_table(
        f"{task}: {name}, mean of {seeds} seeds",
        ("workers", "compressor"),
        (name, "spread", "from dense", "kB sent a step", "of dense"),
        (
            (
                str(row["workers"]),
                _describe(row),
                f"{row['mean']:.4f}",
                f"{row['spread']:.4f}",
                f"{row['from_dense']:+.4f}",
                f"{row['bytes_per_step'] / 1e3:.1f}",
                f"{row['bytes_per_step'] / dense[row['workers']]:.3f}" if dense[row["workers"]] else "",
            )
            for row in rows
        ),
    )


def summarize_result(result: dict[str, Any]) -> str:
    """Return the largest losses and gains from dense, for each number of workers."""
    metric = find_metric(result["runs"][0])
    rows = summarize_runs(result["runs"], metric)
    texts = []
    for workers in dict.fromkeys(row["workers"] for row in rows):
        group = [row for row in rows if row["workers"] == workers]
        dense = next(row for row in group if _is_dense(row))
        others = sorted((row for row in group if row is not dense), key=lambda row: row["from_dense"])
        ends = [f"{row['from_dense']:+.4f} ({_describe(row)})" for row in (others[0], others[-1])]
        name = metric.replace("_", " ")
        texts.append(
            f"{name}, {workers} workers: dense {dense['mean']:.4f}; "
            f"{len(others)} other{'s' if len(others) > 1 else ''} {' to '.join(dict.fromkeys(ends))}"
        )
    return "; ".join(texts)


def _is_dense(row: dict[str, Any]) -> bool:
    return {key: row[key] for key in DENSE} == DENSE


def _describe(row: dict[str, Any]) -> str:
    return " ".join([describe_compressor(row["compressor"]), *row["settings"]])
