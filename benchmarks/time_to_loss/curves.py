"""Loss curves: held-out loss and bytes sent by step, from whole runs whose time does not matter.

Runs of disttrain have simulated workers in one process. Hooks of DDP need processes; they use the loopback interface.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from benchmarks.speed.frameworks import Disttrain
from benchmarks.time_to_loss.composition import Variant, compressed_by
from benchmarks.time_to_loss.recipe import Recipe, TrainingRun, mean_loss
from benchmarks.time_to_loss.workers import Cluster, train_runs
from disttrain.comm import Communicator, simulate

Curve = dict[str, Any]
TIMEOUT = 3600.0  # seconds that simulated workers wait for each other
console = Console(stderr=True)


class CurveStore:
    """The curves of one recipe, in memory and in a file.

    Args:
        path: of the file, which is read, if it exists, and written after every run; None keeps them in memory.
        recipe, workers, evaluate_every: of all curves in it.

    Raises:
        typer.BadParameter: the file is not such a file, or its curves are of another recipe.
    """

    def __init__(self, path: Path | None, recipe: Recipe, workers: int, evaluate_every: int) -> None:
        self._path, self.recipe, self.workers, self.evaluate_every = path, recipe, workers, evaluate_every
        self._header = {"recipe": asdict(recipe), "workers": workers, "evaluate_every": evaluate_every}
        self._curves: dict[tuple[Variant, int], Curve] = {}
        if path is None or not path.exists():
            return
        try:
            content = json.loads(path.read_text())
            if (found := {key: content[key] for key in self._header}) != self._header:
                raise typer.BadParameter(f"{path} has curves of {found}, not of {self._header}")
            for curve in content["curves"]:
                self._curves[Variant.of(curve["who"], curve["setting"]), curve["seed"]] = curve
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise typer.BadParameter(f"{path} is not a file of loss curves ({error!r})") from None

    def get(self, variant: Variant, seed: int) -> Curve:
        return self._curves[variant, seed]

    def compute(self, variants: Sequence[Variant], seeds: int, jobs: int) -> None:
        """Train what is missing: runs of disttrain in ``jobs`` processes, then hooks of DDP, one by one."""
        missing = [key for key in itertools.product(variants, range(seeds)) if key not in self._curves]
        with ProcessPoolExecutor(jobs) as pool:
            futures = {
                pool.submit(simulate_run, self.recipe, self.workers, variant.setting, seed, self.evaluate_every): (
                    variant,
                    seed,
                )
                for variant, seed in missing
                if variant.who == "disttrain"
            }
            for future in as_completed(futures):
                self._add(*futures[future], future.result())
        for variant, seed in missing:
            if variant.who == "ddp":
                cluster = Cluster(self.workers, network=None)
                self._add(variant, seed, train_runs(cluster, self.recipe, [variant], seed, self.evaluate_every)[0])

    def _add(self, variant: Variant, seed: int, run: dict[str, Any]) -> None:
        self._curves[variant, seed] = {
            "who": variant.who,
            "setting": variant.setting,
            "seed": seed,
            "evaluations": [[step, loss] for step, *_, loss in run["evaluations"]],
            "sent_bytes": encode_runs(run["sent_bytes"]),
            "dense_fractions": encode_runs(run["dense_fractions"]),
        }
        console.print(f"curve of {variant.who} {variant.spec}, seed {seed}: {run['evaluations'][-1][-1]}", markup=False)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            content = {**self._header, "curves": list(self._curves.values())}
            temporary = self._path.with_name(f"{self._path.name}.new")
            temporary.write_text(json.dumps(content) + "\n")
            temporary.replace(self._path)


def simulate_run(
    recipe: Recipe, workers: int, compressor: dict[str, Any], seed: int, evaluate_every: int
) -> dict[str, Any]:
    """Train with simulated workers in one thread. The result is as that of ``train_runs``, without seconds."""
    torch.set_num_threads(1)
    # Built in turn and here, because the ranks share torch's random generator.
    models = [recipe.build_model(seed) for _ in range(workers)]

    def train(comm: Communicator) -> tuple[list[tuple[float, int]], dict[str, list[Any]]]:
        setup = Disttrain(comm).prepare(
            models[comm.rank], recipe.build_optimizer(models[comm.rank]), compressor, bucket_mb=None
        )
        run = TrainingRun(recipe, setup, comm.rank, workers, seed, compressed_by(compressor))
        shares: list[tuple[float, int]] = [run.evaluate()]
        sent: dict[str, list[Any]] = {"sent_bytes": [], "dense_fractions": []}
        for step in range(0, recipe.steps, evaluate_every):
            reply = run.train(min(evaluate_every, recipe.steps - step))
            for name, values in sent.items():
                values += reply[name]
            shares.append(run.evaluate())
        return shares, sent

    results = simulate(workers, train, timeout=TIMEOUT, in_turns=True)
    steps = [*range(0, recipe.steps, evaluate_every), recipe.steps]
    losses = [mean_loss(shares) for shares in zip(*(shares for shares, _ in results), strict=True)]
    return {"evaluations": [list(pair) for pair in zip(steps, losses, strict=True)], **results[0][1]}


def encode_runs(values: Sequence[Any]) -> list[list[Any]]:
    """Return runs of equal values as ``[count, value]``."""
    return [[len(list(group)), value] for value, group in itertools.groupby(values)]


def decode_runs(runs: Sequence[Sequence[Any]]) -> list[Any]:
    return [value for count, value in runs for _ in range(count)]
