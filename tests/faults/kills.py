"""Seeded kills: a run is killed again and again, at random moments, and must end as if nothing had happened.

Each chain is one run under one launcher. Its launches end by SIGKILL to a random rank - while it starts, in a step, an
evaluation, or while a checkpoint is written or read - until one comes to its end. After each of them no process may be
left, and every checkpoint that verifies must hold the weights of the run that nobody killed.

    python -m tests.faults.kills --kills 200 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml  # type: ignore[import-untyped]
from safetensors.torch import load_file

from disttrain.errors import UserError
from disttrain.training.checkpoints import folder as checkpoint_folder
from tests.faults.bombed import BOMB
from tests.support.workers import LAUNCHERS, kill_tree, processes_of, rank_of, unavailable, worker_environment

ENGINES = ("torch", "horovod-gloo", "mpi")
NUM_WORKERS = 2
STEPS, SAVE_EVERY = 24, 2
COMMON: dict[str, Any] = {
    "name": "run",
    "task": {"name": "tests.faults.bombed:Bombed", "dropout": 0.3, "num_samples": 52},
    "batch_size": 12,
    "max_steps": STEPS,
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "schedule": {"name": "cosine", "warmup_steps": 3},
    "compressor": {"name": "topk", "ratio": 0.1, "min_numel": 1},
    "checkpoint": {"every_epochs": None, "every_steps": SAVE_EVERY, "keep": 3},
    "evaluation": {"every_epochs": None, "every_steps": 3},
    "num_threads": 1,
    "log_every": 1,
    "resume": "auto",
}
# What is trained, beside what is common to all.
RUNS: dict[str, dict[str, Any]] = {
    "top-k": {"accumulation": 2, "drop_last": True, "task": {**COMMON["task"], "batch_norm": True}},
    "growing batch": {"batch": {"name": "schedule", "milestones": [1, 2.5], "max_batch_size": 36}},
    "fp16": {"precision": "fp16", "optimizer": {"name": "adamw", "lr": 0.01}},
    "PowerSGD": {
        "compressor": {"name": "powersgd", "rank": 1, "min_numel": 1},
        "average": {"decay": 0.9},
    },
}


@dataclass
class Kill:
    """One launch that was to be killed. ``where`` is "end" if it came to its end before."""

    engine: str
    run: str
    where: str
    rank: int
    resumed_from: int
    seconds: float


@dataclass
class Wrong:
    """What must not be."""

    engine: str
    run: str
    what: str


@dataclass
class Report:
    kills: list[Kill] = field(default_factory=list)
    wrong: list[Wrong] = field(default_factory=list)
    num_ended: int = 0

    @property
    def num_kills(self) -> int:
        return sum(kill.where != "end" for kill in self.kills)


class Chain:
    """One run, killed and started again."""

    def __init__(self, folder: Path, engine: str, run: str, expected: Path, rng: random.Random) -> None:
        self.folder, self.engine, self.run, self.expected, self.rng = folder, engine, run, expected, rng
        write_config(folder, run)
        self.output = folder / "output"

    def launch(self, bomb: dict[str, Any] | None) -> int:
        """Start the run, killing a rank from outside if the bomb is for the start; its exit code."""
        start, engine, *_ = LAUNCHERS[self.engine]
        command = [*start(NUM_WORKERS), "-m", "disttrain", "train", str(self.folder / "config.yaml")]
        starts = bomb is not None and bomb["where"] == "start"
        env = worker_environment(**({} if bomb is None or starts else {BOMB: json.dumps(bomb)}))
        with self.output.open("w") as stream:
            streams = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": stream}
            arguments = [*command, f"engine={engine}", f"output={self.folder}"]
            launcher = subprocess.Popen(arguments, env=env, cwd=self.folder, start_new_session=True, **streams)  # type: ignore[call-overload]
        try:
            if starts and bomb:
                self._kill_while_starting(launcher, bomb)
            return launcher.wait(120)
        finally:
            kill_tree(launcher.pid)

    def _kill_while_starting(self, launcher: subprocess.Popen[bytes], bomb: dict[str, Any]) -> None:
        while launcher.poll() is None:
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    is_shell = f"output={self.folder}" not in process.cmdline()  # one string with all of the command
                    if rank_of(process) == bomb["rank"] and not is_shell:
                        time.sleep(bomb["delay"])
                        process.kill()
                        return
            time.sleep(0.02)

    def processes(self) -> list[psutil.Process]:
        return processes_of(self.folder)

    def newest(self) -> int:
        """The step of the newest checkpoint that is whole, 0 if there is none."""
        found = checkpoint_folder.newest(self.folder / "run/checkpoints")
        return found.manifest.step if found else 0

    def wrongs(self) -> Iterator[str]:
        """What is wrong after a launch."""
        _, left = psutil.wait_procs(self.processes(), timeout=15)
        if left:
            yield f"processes are left: {[process.pid for process in left]}"
            for process in left:
                process.kill()
        for path in checkpoint_folder.checkpoints_in(self.folder / "run/checkpoints"):
            try:
                step = checkpoint_folder.verified(path).manifest.step
            except UserError:
                continue  # damaged and known to be
            if path.name != f"step-{step:08d}":
                yield f"{path.name} says that it is of step {step}"
            if not same_model(path, self.expected / "run/checkpoints" / f"step-{step:08d}"):
                yield f"{path.name} verifies, and has other weights than the run that nobody killed"

    def bomb(self) -> dict[str, Any]:
        rng = self.rng
        where = rng.choice(["start", "step", "step", "evaluation", "checkpoint", "checkpoint", "checkpoint"])
        count = {"start": 0, "step": 12, "evaluation": 4, "checkpoint": 120}[where]
        # Afterwards: within what begins there, a step of some milliseconds or a start of some seconds.
        delay = rng.uniform(0, 4) if where == "start" else rng.choice([0, rng.uniform(0, 0.02)])
        return {
            "where": where,
            "rank": rng.randrange(NUM_WORKERS),
            "count": rng.randint(1, max(1, count)),
            "delay": delay,
        }

    def go(self, max_kills: int, report: Report) -> None:
        """Kill the run up to so many times, then let it come to its end."""
        killed, ended = 0, False
        while not ended:
            bomb = self.bomb() if killed < max_kills else None
            resumed_from, began = self.newest(), time.monotonic()
            try:
                code = self.launch(bomb)
            except subprocess.TimeoutExpired:
                report.wrong.append(Wrong(self.engine, self.run, f"hangs after {bomb}: {self.text()}"))
                return
            seconds = time.monotonic() - began
            ended = code == 0
            killed += not ended
            where = "end" if bomb is None or ended else bomb["where"]
            report.kills.append(Kill(self.engine, self.run, where, bomb["rank"] if bomb else 0, resumed_from, seconds))
            wrong = [*self.wrongs()]
            if bomb is None and not ended:
                wrong.append(f"ended with {code} though nobody killed it: {self.text()}")
            report.wrong += [Wrong(self.engine, self.run, f"{what} (after {bomb})") for what in wrong]
            if wrong:
                return
        report.num_ended += 1
        last = f"run/checkpoints/step-{STEPS:08d}"
        if not same_model(self.folder / last, self.expected / last):
            report.wrong.append(Wrong(self.engine, self.run, "the run ended with other weights"))
        if result(self.folder) != result(self.expected):
            report.wrong.append(Wrong(self.engine, self.run, "the run ended with other metrics, records or bytes sent"))

    def text(self) -> str:
        return self.output.read_text()[-3000:]


def write_config(folder: Path, run: str, **changes: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**COMMON, **RUNS[run], **changes}))


def same_model(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same weights, bit for bit."""
    ours, theirs = (load_file(path / "model.safetensors") for path in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def result(folder: Path) -> list[Any]:
    """What a run says of itself: metrics and bytes at the end, and the loss of each step."""
    summary = json.loads((folder / "run/summary.json").read_text())
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    losses = [[record["step"], record["loss"]] for record in records if record["kind"] == "train"]
    return [summary["metrics"], summary["wire"], losses]


def uninterrupted(folder: Path, run: str) -> Path:
    """A run that is not killed, with all its checkpoints; for all engines, as they add two numbers identically."""
    write_config(folder, run, checkpoint={**COMMON["checkpoint"], "keep": STEPS})
    command = [*LAUNCHERS["torch"][0](NUM_WORKERS), "-m", "disttrain", "train", "config.yaml", "engine=torch"]
    with (folder / "output").open("w") as stream:
        options = {"cwd": folder, "env": worker_environment(), "stdout": stream, "stderr": stream}
        subprocess.run([*command, f"output={folder}"], check=True, timeout=120, **options)  # type: ignore[call-overload]
    return folder


def kill_runs(
    folder: Path,
    engines: list[str],
    runs: list[str],
    kills: int,
    seed: int,
    jobs: int,
    chain: int,
    minutes: float = math.inf,
) -> Report:
    """Chains of at most ``chain`` kills each, ``jobs`` at a time, until there were ``kills``; none starts too late."""
    report, rng, deadline = Report(), random.Random(seed), time.monotonic() + 60 * minutes
    with ThreadPoolExecutor(jobs) as pool:
        whole = dict(zip(runs, pool.map(lambda run: uninterrupted(folder / f"whole-{run}", run), runs), strict=True))

        def go(number: int) -> None:
            engine, run = engines[number % len(engines)], runs[number // len(engines) % len(runs)]
            left = kills - report.num_kills
            if left > 0 and time.monotonic() < deadline:
                place = folder / f"chain-{number}"
                Chain(place, engine, run, whole[run], random.Random(seeds[number])).go(min(chain, left), report)
                print(
                    f"chain {number}: {engine}, {run}; {len(report.kills)} launches, {len(report.wrong)} wrong",
                    flush=True,
                )
                if not report.wrong:
                    shutil.rmtree(place)

        seeds = [rng.randrange(2**32) for _ in range(4 * kills + 4)]
        for _ in pool.map(go, range(len(seeds))):
            pass
    return report


def table(report: Report, seed: int) -> str:
    """The report as a page of Markdown."""
    places = ("start", "step", "evaluation", "checkpoint")
    kills = [kill for kill in report.kills if kill.where != "end"]
    lines = [
        f"# {report.num_kills} kills, seed {seed}, {date.today().isoformat()}",
        "",
        f"`make faults KILLS={len(kills)} SEED={seed}` on {os.cpu_count()} cores ({platform.machine()}).",
        f"Runs of {STEPS} steps with {NUM_WORKERS} workers, a checkpoint every {SAVE_EVERY} steps.",
        f"{report.num_ended} runs came to their end; {len(report.wrong)} things were wrong.",
        "",
        "| engine | kills | "
        + " | ".join(f"in {place}" for place in places)
        + " | of rank 0 | launches from a checkpoint | seconds a launch |",
        "|---|" + "---|" * 8,
    ]
    for engine in dict.fromkeys(kill.engine for kill in report.kills):
        own = [kill for kill in kills if kill.engine == engine]
        counts = Counter(kill.where for kill in own)
        seconds = sorted(kill.seconds for kill in report.kills if kill.engine == engine)
        cells = [len(own), *(counts[place] for place in places), sum(kill.rank == 0 for kill in own)]
        resumed = sum(kill.resumed_from > 0 for kill in report.kills if kill.engine == engine)
        cells += [resumed, f"{seconds[len(seconds) // 2]:.1f}"]
        lines.append(f"| {engine} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", *(f"- WRONG: {wrong.engine}, {wrong.run}: {wrong.what}" for wrong in report.wrong)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--chain", type=int, default=8, help="kills of one run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no other run is begun")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    engines = [engine for engine in ENGINES if unavailable(engine) is None]
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        report = kill_runs(
            Path(folder),
            engines,
            [*RUNS],
            arguments.kills,
            arguments.seed,
            arguments.jobs,
            arguments.chain,
            arguments.minutes,
        )
    text = table(report, arguments.seed)
    arguments.output.mkdir(exist_ok=True)
    (arguments.output / f"{date.today().isoformat()}-{report.num_kills}-kills-seed-{arguments.seed}.md").write_text(
        text
    )
    print(text)
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
