"""Step time of disttrain against its peers, side by side over links of a given rate.

    python benchmarks/step_time.py --rate 1gbit --rate none --model mlp --model gpt --engine gloo --engine horovod

Two teams of workers hold the same model, weights, data and inner optimizer, once for each setting: disttrain's
compressors, the peer's hooks. All take turns, a few steps each, so that whatever else the machine does hits all. What
counts is the ratio to the peer without compression in the same turn; the table gives the median over turns and its 95 %
interval. Shaped links need root and iproute2; without them it says so and uses loopback.
"""

from __future__ import annotations

import contextlib
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

from benchmarks.contenders import ALONE  # noqa: E402
from benchmarks.machine import describe_machine, show_and_write  # noqa: E402
from benchmarks.network import ShapedNetwork  # noqa: E402
from benchmarks.teams import Team, TeamError  # noqa: E402
from disttrain import compression  # noqa: E402

console = Console(stderr=True)


class Model(str, Enum):
    MLP = "mlp"
    GPT = "gpt"


class Engine(str, Enum):
    GLOO = "gloo"
    HOROVOD = "horovod"
    HOROVOD_MPI = "horovod-mpi"


class Hook(str, Enum):
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
    compressor: Annotated[
        list[str], typer.Option(help="disttrain's: dense, topk:ratio=0.01, ...; all is every registered one.")
    ] = ["dense"],  # noqa: B006
    at_once: Annotated[
        int, typer.Option(min=1, help="Compressors that a team holds at a time; the next ones get new processes.")
    ] = 4,
    bucket_mb: Annotated[float | None, typer.Option(help="disttrain's bucket size, if not its default.")] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Also without any exchange: what a step takes at least.")
    ] = False,
    hook: Annotated[list[Hook], typer.Option(help="The peer's own compression, beside it without.")] = [],  # noqa: B006
    peer_env: Annotated[
        list[str], typer.Option(help="NAME=VALUE for the peer's workers: MALLOC_MMAP_THRESHOLD_=268435456, ...")
    ] = [],  # noqa: B006
    output: Annotated[Path, typer.Option(help="Directory of the result files.")] = ROOT / "benchmarks" / "results",
    label: Annotated[str, typer.Option(help="Goes into the result files' names.")] = "",
) -> None:
    """Compare step times of disttrain and a peer, for every combination of rate, model and engine."""
    rates = {text: parse_rate(text) for text in rate}
    wanted = itertools.chain.from_iterable(compression.names() if text == "all" else [text] for text in compressor)
    settings: dict[str, Any] = {
        "compressors": [*map(parse_compressor, wanted), *([ALONE] if alone else [])],
        "at_once": at_once,
        "hooks": [{"name": "none"}, *({"name": chosen.value} for chosen in hook)],
        "bucket_mb": bucket_mb,
        "peer_env": parse_environment(peer_env),
    }
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
                found = [
                    {"part": number, **row}
                    for number, part in enumerate(split(settings))
                    for row in measure(network, chosen_model, chosen_engine, workers, turns, steps, part)
                ]
            except TeamError as error:
                console.print(str(error), style="red", markup=False)
                raise typer.Exit(1) from None
        where = {"rate": rate_name, "model": chosen_model.value, "engine": chosen_engine.value}
        rows += [{**where, **row} for row in found]
    machine["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    result = {
        "machine": machine,
        "workers": workers,
        "turns": turns,
        "steps": steps,
        "settings": settings,
        "rows": rows,
    }
    path = show_and_write(make_table(rows, workers), result, output, "step-time", label)
    console.print(f"written: {path}")


def split(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What one pair of teams after the other holds: ``at_once`` compressors beside the peer as it is.

    The peer's hooks come last, in a pair of their own: where it holds three models DDP was seen to take 648 ms a step,
    with one, as its users have it, 700 to 720.
    """
    size, every, hooks = settings["at_once"], settings["compressors"], settings["hooks"]
    parts = [
        {**settings, "compressors": every[start : start + size], "hooks": hooks[:1]}
        for start in range(0, len(every), size)
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
    """Let all entries take turns: every setting of either team. One row for each; ratios are to the peer as it is."""
    peer, launcher, freeze = ENGINES[engine]
    options = ["--model", model.value]
    if settings["bucket_mb"] is not None:
        options += ["--bucket-mb", str(settings["bucket_mb"])]
    num_threads = max(1, (os.cpu_count() or 1) // workers)
    with contextlib.ExitStack() as stack:
        teams = []
        for port, name, env in ((29400, peer, settings["peer_env"]), (29401, "disttrain", {})):
            team = Team(name, launcher, workers, options, network, num_threads, port, freeze, environment=env)
            teams.append(stack.enter_context(team))
        entries: list[tuple[Team, int, dict[str, Any]]] = []
        for team, all_settings in zip(teams, (settings["hooks"], settings["compressors"]), strict=True):
            for index, setting in enumerate(all_settings):
                team.ask(do="enter", setting=setting)
                team.ask(do="step", entry=index, warm_up=3, steps=0)
                entries.append((team, index, setting))
        prints = [(setting, team.ask(do="fingerprint", entry=index)) for team, index, setting in entries]
        for setting, found in prints[1:]:
            if setting == {"name": "dense"}:
                check_same_work(found, prints[0][1])
        seconds: list[list[list[float]]] = [[] for _ in entries]
        cpu: list[list[float]] = [[] for _ in entries]
        sent: list[int | None] = [None for _ in entries]
        for turn in range(turns):
            order = list(enumerate(entries))
            for number, (team, index, _) in order if turn % 2 == 0 else reversed(order):
                answers = team.ask(do="step", entry=index, warm_up=1, steps=steps)
                seconds[number].append(np.mean([answer["seconds"] for answer in answers], axis=0).tolist())
                cpu[number].append(float(np.mean([answer["cpu_seconds"] for answer in answers])))
                sent[number] = answers[0]["sent_bytes"]
    base = np.median(np.array(seconds[0]), axis=1)
    rows = []
    for (team, _, setting), times, cpu_times, sent_bytes in zip(entries, seconds, cpu, sent, strict=True):
        ratios = np.median(np.array(times), axis=1) / base
        low, high = interval_of_median(ratios)
        rows.append(
            {
                "who": team.contender,
                "setting": setting,
                "milliseconds": round(float(np.median(times)) * 1e3, 1),
                "cpu_milliseconds": round(float(np.median(cpu_times)) * 1e3, 1),
                "sent_bytes": sent_bytes,
                "ratio": round(float(np.median(ratios)), 3),
                "ratio_low": round(low, 3),
                "ratio_high": round(high, 3),
                "ratios": ratios.round(3).tolist(),
                "seconds": np.array(times).round(5).tolist(),
            }
        )
    return rows


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


def parse_environment(texts: list[str]) -> dict[str, str]:
    """NAME=VALUE, several times."""
    pairs = [text.partition("=") for text in texts]
    if odd := [name for name, equals, _ in pairs if not (name and equals)]:
        raise typer.BadParameter(f"{odd[0]!r} is no NAME=VALUE")
    return {name: value for name, _, value in pairs}


def describe_compressor(spec: dict[str, Any]) -> str:
    """``name, field=value, ...``"""
    return ", ".join([spec["name"], *(f"{key}={value}" for key, value in spec.items() if key != "name")])


def make_table(rows: list[dict[str, Any]], workers: int) -> Table:
    table = Table(title=f"Median step of {workers} workers; ratios to the peer without compression")
    for column in ("link", "model", "engine", "who", "with"):
        table.add_column(column)
    for column in ("ms", "ratio", "95 % interval", "CPU ms", "MB sent"):
        table.add_column(column, justify="right")
    for row in rows:
        flags = {True: "overlap_step"} if row["setting"].get("overlap_step") else {}
        setting = ", ".join(flags.get(value, str(value)) for value in row["setting"].values())
        sent = "" if row["sent_bytes"] is None else f"{row['sent_bytes'] / 1e6:.2f}"
        interval = f"{row['ratio_low']:.3f} - {row['ratio_high']:.3f}"
        figures = [
            f"{row['milliseconds']:.0f}",
            f"{row['ratio']:.3f}",
            interval,
            f"{row['cpu_milliseconds']:.0f}",
            sent,
        ]
        table.add_row(row["rate"], row["model"], row["engine"], row["who"], setting, *figures)
    return table


if __name__ == "__main__":
    typer.run(main)
