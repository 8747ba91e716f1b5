"""Step time of disttrain against its peers, side by side over links of a given rate.

    python benchmarks/step_time.py --rate 1gbit --rate none --model mlp --model gpt --engine gloo --engine horovod

Two teams of workers hold the same model, weights, data and inner optimizer. They take turns, a few steps each, so that
whatever else the machine does hits both. What counts is the ratio of each pair of turns; the table gives the median of
the pairs and its 95 % interval. Shaped links need root and iproute2; without them it says so and uses loopback.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import itertools
import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine, summarise  # noqa: E402
from benchmarks.network import ShapedNetwork  # noqa: E402
from benchmarks.teams import Team, TeamError  # noqa: E402

console = Console(stderr=True)


class Model(str, Enum):
    MLP = "mlp"
    GPT = "gpt"


class Engine(str, Enum):
    GLOO = "gloo"
    HOROVOD = "horovod"
    HOROVOD_MPI = "horovod-mpi"


class Hook(str, Enum):
    NONE = "none"
    FP16 = "fp16"
    POWERSGD = "powersgd"


# Engine -> the peer, what starts the workers, whether an idle team must be stopped (see Team.freeze).
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
    workers: Annotated[int, typer.Option(min=1, max=64, help="One on each host.")] = 4,
    turns: Annotated[int, typer.Option(min=2, help="Turns of each team.")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps in a turn, after one that is not timed.")] = 3,
    compressor: Annotated[str, typer.Option(help="disttrain's: dense, topk:ratio=0.01, ...")] = "dense",
    bucket_mb: Annotated[float | None, typer.Option(help="disttrain's bucket size, if not its default.")] = None,
    hook: Annotated[Hook, typer.Option(help="The peer's compression.")] = Hook.NONE,
    output: Annotated[Path, typer.Option(help="Directory of the result files.")] = ROOT / "benchmarks" / "results",
    label: Annotated[str, typer.Option(help="Goes into the result files' names.")] = "",
) -> None:
    """Compare step times of disttrain and a peer, for every combination of rate, model and engine."""
    rates = {text: parse_rate(text) for text in rate}
    settings = {"compressor": parse_compressor(compressor), "bucket_mb": bucket_mb, "hook": hook.value}
    if (reason := ShapedNetwork.unavailable()) is not None:
        console.print(f"No shaped network: {reason}. All workers share this host's loopback.", style="yellow")
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
                row = measure(network, chosen_model, chosen_engine, workers, turns, steps, settings)
            except TeamError as error:
                console.print(str(error), style="red", markup=False)
                raise typer.Exit(1) from None
        rows.append({"rate": rate_name, "model": chosen_model.value, "engine": chosen_engine.value, **row})
    machine["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    result = {
        "machine": machine,
        "workers": workers,
        "turns": turns,
        "steps": steps,
        "settings": settings,
        "rows": rows,
    }
    Console().print(make_table(rows, workers, settings))
    console.print(f"written: {write(result, output, label)}")


def measure(
    network: ShapedNetwork | None,
    model: Model,
    engine: Engine,
    workers: int,
    turns: int,
    steps: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Let the two teams take turns; the times of all steps and what follows from them."""
    peer, launcher, freeze = ENGINES[engine]
    options = ["--model", model.value, "--hook", settings["hook"], "--compressor", json.dumps(settings["compressor"])]
    if settings["bucket_mb"] is not None:
        options += ["--bucket-mb", str(settings["bucket_mb"])]
    num_threads = max(1, (os.cpu_count() or 1) // workers)
    with contextlib.ExitStack() as stack:
        teams = [
            stack.enter_context(
                Team(name, launcher, workers, options, network, num_threads, port=29400 + index, freeze=freeze)
            )
            for index, name in enumerate(("disttrain", peer))
        ]
        for team in teams:
            team.ask(do="step", warm_up=3, steps=0)
        prints = {team.contender: team.ask(do="fingerprint") for team in teams}
        if settings["compressor"] == {"name": "dense"} and settings["hook"] == "none":
            check_same_work(*prints.values())
        seconds: dict[str, list[list[float]]] = {team.contender: [] for team in teams}
        cpu: dict[str, list[float]] = {team.contender: [] for team in teams}
        for turn in range(turns):
            for team in teams if turn % 2 == 0 else reversed(teams):
                answers = team.ask(do="step", warm_up=1, steps=steps)
                seconds[team.contender].append(np.mean([answer["seconds"] for answer in answers], axis=0).tolist())
                cpu[team.contender].append(float(np.mean([answer["cpu_seconds"] for answer in answers])))
    ours, theirs = (np.array(seconds[team.contender]) for team in teams)
    ratios = np.median(ours, axis=1) / np.median(theirs, axis=1)
    low, high = interval_of_median(ratios)
    return {
        "peer": peer,
        "milliseconds": {name: round(float(np.median(times)) * 1e3, 1) for name, times in seconds.items()},
        "cpu_milliseconds": {name: round(float(np.median(times)) * 1e3, 1) for name, times in cpu.items()},
        "ratio": round(float(np.median(ratios)), 3),
        "ratio_low": round(low, 3),
        "ratio_high": round(high, 3),
        "ratios": ratios.round(3).tolist(),
        "seconds": {name: np.array(times).round(5).tolist() for name, times in seconds.items()},
    }


def check_same_work(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    """After the same number of steps, contenders that do the same work have the same losses and parameters."""
    for mine, other in zip(ours, theirs, strict=True):
        for key, value in mine.items():
            if abs(value - other[key]) > 1e-4 * max(1.0, abs(value)):
                raise TeamError(f"the teams do not compute the same: {key} is {value} against {other[key]}")


def interval_of_median(values: np.ndarray, num_draws: int = 4000) -> tuple[float, float]:
    """The bootstrap's 95 % interval of the median."""
    draws = np.random.default_rng(0).choice(values, size=(num_draws, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(low), float(high)


def parse_rate(text: str) -> float | None:
    """Mbit/s, or None for an unshaped link."""
    factors = {"gbit": 1000.0, "mbit": 1.0}
    if text == "none":
        return None
    for unit, factor in factors.items():
        with contextlib.suppress(ValueError):
            if text.endswith(unit) and float(text.removesuffix(unit)) > 0:
                return float(text.removesuffix(unit)) * factor
    raise typer.BadParameter(f"{text!r} is no rate: write 1gbit, 100mbit, ... or none")


def parse_compressor(text: str) -> dict[str, Any]:
    """``name:field=value,field=value`` as the mapping of a config."""
    name, _, fields = text.partition(":")
    compressor: dict[str, Any] = {"name": name}
    for item in fields.split(",") if fields else []:
        key, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"{item!r} in {text!r} is no field=value")
        try:
            compressor[key] = json.loads(value)
        except json.JSONDecodeError:
            compressor[key] = value
    return compressor


def make_table(rows: list[dict[str, Any]], workers: int, settings: dict[str, Any]) -> Table:
    compressor = ", ".join(str(value) for value in settings["compressor"].values())
    table = Table(title=f"Median step, {workers} workers, disttrain with {compressor}, peer's hook: {settings['hook']}")
    for column in ("link", "model", "engine", "peer"):
        table.add_column(column)
    for column in ("disttrain ms", "peer ms", "ratio", "95 % interval", "CPU ms"):
        table.add_column(column, justify="right")
    for row in rows:
        ours, theirs = (row["milliseconds"][name] for name in ("disttrain", row["peer"]))
        our_cpu, their_cpu = (row["cpu_milliseconds"][name] for name in ("disttrain", row["peer"]))
        interval = f"{row['ratio_low']:.3f} - {row['ratio_high']:.3f}"
        times = [f"{ours:.0f}", f"{theirs:.0f}", f"{row['ratio']:.3f}", interval]
        table.add_row(row["rate"], row["model"], row["engine"], row["peer"], *times, f"{our_cpu:.0f} / {their_cpu:.0f}")
    return table


def write(result: dict[str, Any], output: Path, label: str) -> Path:
    """All figures as JSON; beside it the table, the machine and the command as Markdown. The latter's path."""
    day = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    stem = "-".join(part for part in (day, "step-time", label) if part)
    path = output / f"{stem}.md"
    for number in itertools.count(2):
        if not path.exists():
            break
        path = output / f"{stem}-{number}.md"
    output.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(result) + "\n")
    plain = Console(file=io.StringIO(), width=120)
    plain.print(make_table(result["rows"], result["workers"], result["settings"]))
    assert isinstance(plain.file, io.StringIO)
    path.write_text(f"```\n{plain.file.getvalue()}\n{summarise(result['machine'])}\n```\n")
    return path


if __name__ == "__main__":
    typer.run(main)
