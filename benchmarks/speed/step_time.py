"""Step time of disttrain and its peers, side by side over links of a given rate.

    python -m benchmarks step-time --rate 1gbit --rate none --model mlp --model gpt --engine gloo --engine horovod

Two groups of workers train the same model with the same weights, data and inner optimizer: disttrain with each
compressor, the peer with each communication hook. They take turns of a few steps each, so that other load on the
machine affects all of them. The baseline is the peer without compression. The table gives, for each setting, the median
over turns of the ratio to the baseline in the same turn, and the median's 95 % interval.

Shaped links need root and iproute2. Without them the benchmark prints the reason and uses the loopback interface.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from enum import Enum
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.machine import describe_machine, load_average
from benchmarks.common.options import (
    RESULTS,
    LabelOption,
    OutputOption,
    describe_compressor,
    parse_compressor,
    parse_environment,
    parse_rate,
)
from benchmarks.common.results import make_table, write_result
from benchmarks.common.statistics import ratio_to_baseline
from benchmarks.network import ShapedNetwork
from benchmarks.speed.frameworks import NO_EXCHANGE
from benchmarks.speed.worker_group import WorkerError, WorkerGroup
from disttrain import compression

console = Console(stderr=True)


class Model(str, Enum):
    MLP = "mlp"
    GPT = "gpt"


class InnerOptimizer(str, Enum):
    SGD = "sgd"
    ADAMW = "adamw"


class Engine(str, Enum):
    GLOO = "gloo"
    HOROVOD = "horovod"
    HOROVOD_MPI = "horovod-mpi"


class Hook(str, Enum):
    FP16 = "fp16"
    POWERSGD = "powersgd"


# Engine -> the peer, the launcher, whether to pause the workers of an idle group.
ENGINES = {
    Engine.GLOO: ("ddp", "env", False),
    Engine.HOROVOD: ("horovod", "horovodrun", True),
    Engine.HOROVOD_MPI: ("horovod", "mpirun", True),
}


def main(
    rate: Annotated[list[str], typer.Option(help="Of every link, each way: 1gbit, 100mbit, ... or none.")] = ["1gbit"],  # noqa: B006
    model: Annotated[
        list[Model], typer.Option(help="mlp: 10.5 M parameters, batch 32; gpt: 7.6 M, batch 2 x 64 tokens.")
    ] = [Model.MLP, Model.GPT],  # noqa: B006
    engine: Annotated[
        list[Engine],
        typer.Option(help="gloo: against torch DDP. horovod: against its own optimizer (horovodrun or mpirun)."),
    ] = [Engine.GLOO],  # noqa: B006
    optimizer: Annotated[
        InnerOptimizer, typer.Option(help="Of both sides: sgd has momentum, adamw is torch's.")
    ] = InnerOptimizer.SGD,
    workers: Annotated[int, typer.Option(min=1, max=64, help="One on each host.")] = 4,
    turns: Annotated[int, typer.Option(min=2, help="Turns of each setting.")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps in a turn, after one untimed step.")] = 3,
    compressor: Annotated[
        list[str], typer.Option(help="disttrain's: dense, topk:ratio=0.01, ...; all is every registered one.")
    ] = ["dense"],  # noqa: B006
    at_once: Annotated[
        int, typer.Option(min=1, help="Compressors measured by the same processes; further ones get new processes.")
    ] = 4,
    bucket_mb: Annotated[float | None, typer.Option(help="disttrain's bucket size, if not its default.")] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Also measure steps without any exchange, the lower bound.")
    ] = False,
    hook: Annotated[list[Hook], typer.Option(help="Also measure the peer with this compression.")] = [],  # noqa: B006
    peer_env: Annotated[
        list[str], typer.Option(help="NAME=VALUE for the peer's workers: MALLOC_MMAP_THRESHOLD_=268435456, ...")
    ] = [],  # noqa: B006
    output: OutputOption = RESULTS,
    label: LabelOption = "",
) -> None:
    """Compare step times of disttrain and a peer for every combination of rate, model and engine."""
    rates = {text: parse_rate(text) for text in rate}
    names = itertools.chain.from_iterable(compression.names() if text == "all" else [text] for text in compressor)
    settings: dict[str, Any] = {
        "compressors": [*map(parse_compressor, names), *([NO_EXCHANGE] if alone else [])],
        "at_once": at_once,
        "hooks": [{"name": "none"}, *({"name": chosen.value} for chosen in hook)],
        "bucket_mb": bucket_mb,
        "optimizer": optimizer.value,
        "peer_env": parse_environment(peer_env),
    }
    if (reason := ShapedNetwork.unavailable()) is not None:
        console.print(f"No shaped network: {reason}. All workers use the loopback interface.", style="yellow")
        rates = {"loopback": None}
    machine = describe_machine()
    rows: list[dict[str, Any]] = []
    for (rate_name, rate_mbit), chosen_model, chosen_engine in itertools.product(rates.items(), model, engine):
        console.print(f"{chosen_engine.value}, {chosen_model.value}, {rate_name} ...")
        with contextlib.ExitStack() as stack:
            network = None
            if reason is None:
                network = stack.enter_context(ShapedNetwork(workers, rate_mbit, time_limit=1800))
            try:
                measured = [
                    {"part": number, **row}
                    for number, part in enumerate(split_settings(settings))
                    for row in measure(network, chosen_model, chosen_engine, workers, turns, steps, part)
                ]
            except WorkerError as error:
                console.print(str(error), style="red", markup=False)
                raise typer.Exit(1) from None
        where = {"rate": rate_name, "model": chosen_model.value, "engine": chosen_engine.value}
        rows += [{**where, **row} for row in measured]
    machine["load_average_after"] = load_average()
    result = {
        "machine": machine,
        "workers": workers,
        "turns": turns,
        "steps": steps,
        "settings": settings,
        "rows": rows,
    }
    write_result(tabulate(rows, workers, optimizer.value), result, output, "step-time", label)


def split_settings(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Distribute settings over successive pairs of groups, with ``at_once`` compressors and the baseline in each.

    The peer's hooks come last, in a pair of their own: DDP with three models in its processes took 648 ms for a step,
    with one model, as users have it, 700 to 720 ms.
    """
    size, compressors, hooks = settings["at_once"], settings["compressors"], settings["hooks"]
    parts = [
        {**settings, "compressors": compressors[start : start + size], "hooks": hooks[:1]}
        for start in range(0, len(compressors), size)
    ]
    return [*parts, {**settings, "compressors": []}] if len(hooks) > 1 else parts


def measure(
    network: ShapedNetwork | None,
    model: Model,
    engine: Engine,
    workers: int,
    turns: int,
    steps: int,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Time all settings of both groups in turns and return one row for each; the first is the baseline."""
    peer, launcher, pause_when_idle = ENGINES[engine]
    options = ["--model", model.value, "--optimizer", settings["optimizer"]]
    if settings["bucket_mb"] is not None:
        options += ["--bucket-mb", str(settings["bucket_mb"])]
    num_threads = max(1, (os.cpu_count() or 1) // workers)
    with contextlib.ExitStack() as stack:
        groups = []
        for port, name, env in ((29400, peer, settings["peer_env"]), (29401, "disttrain", {})):
            group = WorkerGroup(
                name, launcher, workers, options, network, num_threads, port, pause_when_idle, environment=env
            )
            groups.append(stack.enter_context(group))
        variants: list[tuple[WorkerGroup, int, dict[str, Any]]] = []
        for group, group_settings in zip(groups, (settings["hooks"], settings["compressors"]), strict=True):
            for index, setting in enumerate(group_settings):
                group.request(do="prepare", setting=setting)
                group.request(do="step", setup=index, num_warmup=3, num_steps=0)
                variants.append((group, index, setting))
        fingerprints = [group.request(do="fingerprint", setup=index) for group, index, _ in variants]
        for (_, _, setting), found in zip(variants[1:], fingerprints[1:], strict=True):
            if setting == {"name": "dense"}:
                check_same_results(found, fingerprints[0])
        seconds: list[list[list[float]]] = [[] for _ in variants]
        cpu: list[list[float]] = [[] for _ in variants]
        sent: list[int | None] = [None for _ in variants]
        for turn in range(turns):
            order = list(enumerate(variants))
            for number, (group, index, _) in order if turn % 2 == 0 else reversed(order):
                replies = group.request(do="step", setup=index, num_warmup=1, num_steps=steps)
                seconds[number].append(np.mean([reply["seconds"] for reply in replies], axis=0).tolist())
                cpu[number].append(float(np.mean([reply["cpu_seconds"] for reply in replies])))
                sent[number] = replies[0]["sent_bytes"]
    rows = []
    for (group, _, setting), times, cpu_times, sent_bytes in zip(variants, seconds, cpu, sent, strict=True):
        ratio = ratio_to_baseline(times, seconds[0])
        rows.append(
            {
                "who": group.framework,
                "setting": setting,
                "milliseconds": round(float(np.median(times)) * 1e3, 1),
                "cpu_milliseconds": round(float(np.median(cpu_times)) * 1e3, 1),
                "sent_bytes": sent_bytes,
                "ratio": round(ratio.median, 3),
                "ratio_low": round(ratio.low, 3),
                "ratio_high": round(ratio.high, 3),
                "ratios": ratio.values.round(3).tolist(),
                "seconds": np.array(times).round(5).tolist(),
            }
        )
    return rows


def check_same_results(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    """Raise ``WorkerError`` if losses or parameters differ after the same number of uncompressed steps."""
    for mine, other in zip(ours, theirs, strict=True):
        for key, value in mine.items():
            if abs(value - other[key]) > 1e-4 * max(1.0, abs(value)):
                raise WorkerError(
                    f"disttrain and its peer do not train the same: {key} is {value}, the peer's {other[key]}"
                )


def tabulate(rows: list[dict[str, Any]], workers: int, optimizer: str) -> Table:
    return make_table(
        f"Median step of {workers} workers with {optimizer}; ratios to the peer without compression",
        ("link", "model", "engine", "who", "with"),
        ("ms", "ratio", "95 % interval", "CPU ms", "MB sent"),
        (
            (
                row["rate"],
                row["model"],
                row["engine"],
                row["who"],
                describe_compressor(row["setting"]),
                f"{row['milliseconds']:.0f}",
                f"{row['ratio']:.3f}",
                f"{row['ratio_low']:.3f} - {row['ratio_high']:.3f}",
                f"{row['cpu_milliseconds']:.0f}",
                "" if row["sent_bytes"] is None else f"{row['sent_bytes'] / 1e6:.2f}",
            )
            for row in rows
        ),
    )


def summarize_result(result: dict[str, Any]) -> str:
    """Return the best and the worst ratio of every combination of link, model and engine."""
    texts = []
    # Results from before the option was there have no name of an optimizer: they are all of SGD.
    optimizer = result.get("settings", {}).get("optimizer", "sgd")
    for (rate, model, engine), group in itertools.groupby(
        result["rows"], key=lambda row: (row["rate"], row["model"], row["engine"])
    ):
        rows = list(group)
        ours = [row for row in rows if row["who"] == "disttrain" and row["setting"] != NO_EXCHANGE]
        best, worst = (choose(ours, key=lambda row: row["ratio"]) for choose in (min, max))
        ratios = [f"{row['ratio']:.3f} ({describe_compressor(row['setting'])})" for row in (best, worst)]
        link = f"{rate} links" if rate != "none" else "unshaped links"
        span = " to ".join(dict.fromkeys(ratios))
        trained = model if optimizer == "sgd" else f"{model} with {optimizer}"
        texts.append(f"{trained}, {engine}, {link}: {span} of {rows[0]['who']}'s step")
    return "; ".join(texts)
