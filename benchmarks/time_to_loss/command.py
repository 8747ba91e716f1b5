"""Seconds until the held-out loss that dense training ends with, by links of a given rate.

    python -m benchmarks time-to-loss --rate 1gbit --curves curves.json

trains a GPT on text with AdamW, by disttrain with each compressor and by torch DDP with each hook, with the same loop,
initial weights and batches. The target is the final loss of dense training and a tolerance.

``--mode real`` trains all of them from start to end over the links, in turns of the steps between two evaluations.
``--mode composed`` takes the steps from loss curves of simulated workers, and measures only the time of a step of each
kind (dense, refresh, compressed) over the links: the seconds are the sum over the steps of the time of their kind. A
long run then takes minutes on each link, and all links share the curves (``--curves``). Half precision (DDP's hook
``fp16``, ``bf16``) has the curve of dense training.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.common.machine import describe_machine, load_average
from benchmarks.common.options import (
    NUM_CORES,
    RESULTS,
    JobsOption,
    LabelOption,
    OutputOption,
    SeedsOption,
    parse_compressor,
    parse_rate,
)
from benchmarks.common.results import write_result
from benchmarks.network import ShapedNetwork
from benchmarks.speed.worker_group import WorkerError
from benchmarks.time_to_loss.composition import BASELINE, OWN_DENSE, Variant
from benchmarks.time_to_loss.curves import CurveStore
from benchmarks.time_to_loss.recipe import Recipe
from benchmarks.time_to_loss.rows import compose_runs, describe_real_runs, make_rows, tabulate
from benchmarks.time_to_loss.workers import Cluster, time_kinds, train_runs

console = Console(stderr=True)
TIME_LIMIT = 7 * 24 * 3600.0  # seconds that workers may run


class Mode(str, Enum):
    REAL = "real"
    COMPOSED = "composed"


def main(
    rate: Annotated[list[str], typer.Option(help="Of every link, each way: 1gbit, 100mbit, ... or none.")] = [  # noqa: B006
        "100mbit",
        "1gbit",
        "10gbit",
    ],
    mode: Annotated[list[Mode], typer.Option(help="real: whole runs over the links; composed: curves and times.")] = [  # noqa: B006
        Mode.REAL,
        Mode.COMPOSED,
    ],
    workers: Annotated[int, typer.Option(min=2, max=64, help="One on each host.")] = 4,
    compressor: Annotated[
        list[str], typer.Option(help="disttrain's, beside dense: bf16, efsign:block_size=64,dense_steps=150, ...")
    ] = ["bf16", "qsgd:bits=4", "efsign:block_size=64,dense_steps=150", "powersgd:rank=16,dense_steps=150"],  # noqa: B006
    hook: Annotated[list[str], typer.Option(help="DDP's, beside none: fp16, powersgd:rank=16,start=150")] = [  # noqa: B006
        "fp16",
        "powersgd:rank=16,start=150",
    ],
    width: Annotated[int, typer.Option(min=4, help="Of the GPT.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Of the GPT.")] = 2,
    context: Annotated[int, typer.Option(min=2, help="Bytes in a sample.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a step over all workers.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Of a whole run.")] = 1000,
    lr: Annotated[float, typer.Option(min=0, help="Highest learning rate, of a cosine schedule.")] = 3e-3,
    lr_warmup: Annotated[int, typer.Option(min=0, help="Steps in which the rate rises.")] = 100,
    text: Annotated[str | None, typer.Option(help="As task.path; by default the standard library's source.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Bits per byte above dense training's final loss.")] = 0.02,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between two evaluations.")] = 25,
    seeds: SeedsOption = 1,
    turns: Annotated[int, typer.Option(min=2, help="composed: turns of each setting.")] = 12,
    timed_steps: Annotated[int, typer.Option(min=1, help="composed: steps timed in a turn.")] = 3,
    curves: Annotated[
        Path | None, typer.Option(help="composed: a file of loss curves; missing ones are computed and added.")
    ] = None,
    curves_only: Annotated[bool, typer.Option("--curves-only", help="Compute the loss curves and stop.")] = False,
    jobs: JobsOption = NUM_CORES,
    at_once: Annotated[int, typer.Option(min=1, help="Models of disttrain in the same processes.")] = 6,
    output: OutputOption = RESULTS,
    label: LabelOption = "",
) -> None:
    """Compare the seconds to dense training's loss, of disttrain and of torch DDP with its hooks."""
    if batch_size % workers:
        raise typer.BadParameter(f"--batch-size {batch_size} must be a multiple of --workers {workers}")
    if curves_only and curves is None:
        raise typer.BadParameter("--curves-only needs a file to write to: --curves FILE")
    recipe = Recipe(text, width, layers, context, batch_size, steps, lr, lr_warmup)
    machine = describe_machine()
    own = [OWN_DENSE, *(Variant.of("disttrain", parse_compressor(name)) for name in compressor)]
    hooks = [Variant.of("ddp", parse_compressor(name)) for name in hook]
    variants = list(dict.fromkeys([BASELINE, *hooks, *own]))
    runs: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    try:
        store = CurveStore(curves, recipe, workers, evaluate_every)
        if Mode.COMPOSED in mode or curves_only:
            store.compute(list(dict.fromkeys(variant.trains_as for variant in variants)), seeds, jobs)
        if curves_only:
            return
        for rate_name, chosen in itertools.product(rate, mode):
            with connect(rate_name, workers, at_once) as (link, cluster):
                console.print(f"{link}, {chosen.value} ...")
                if chosen is Mode.REAL:
                    for seed in range(seeds):
                        trained = train_runs(cluster, recipe, variants, seed, evaluate_every)
                        runs += describe_real_runs(link, variants, seed, trained, tolerance)
                else:
                    timed = time_kinds(cluster, recipe, variants, turns, timed_steps)
                    times += [
                        {"rate": link, "who": variant.who, "setting": variant.setting, "seconds": seconds}
                        for variant, seconds in zip(variants, timed, strict=True)
                    ]
                    runs += compose_runs(link, variants, seeds, store, timed, tolerance)
    except WorkerError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    machine["load_average_after"] = load_average()
    rows = make_rows(runs)
    result = {
        "machine": machine,
        "recipe": asdict(recipe),
        "workers": workers,
        "tolerance": tolerance,
        "seeds": seeds,
        "turns": turns,
        "timed_steps": timed_steps,
        "rows": rows,
        "runs": runs,
        "step_seconds": times,
    }
    write_result(tabulate(rows, result), result, output, "time-to-loss", label)


@contextlib.contextmanager
def connect(rate: str, workers: int, at_once: int) -> Iterator[tuple[str, Cluster]]:
    """Build a network of the given rate, or use the loopback interface; return the link's name and the cluster."""
    rate_mbit = parse_rate(rate)
    if (reason := ShapedNetwork.unavailable()) is not None:
        console.print(f"No shaped network: {reason}. All workers use the loopback interface.", style="yellow")
        yield "loopback", Cluster(workers, None, at_once)
        return
    with ShapedNetwork(workers, rate_mbit, time_limit=TIME_LIMIT) as network:
        yield rate, Cluster(workers, network, at_once)
