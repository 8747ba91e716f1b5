"""The cost of checkpoints: steps without them, with writing in the background, and with training waiting for the disk.

    python -m benchmarks checkpointing --rate 1gbit --workers 4 --compressor dense
    torchrun --nproc-per-node 2 -m benchmarks checkpointing --compressor topk:ratio=0.01 --folder /some/disk

The model is the MLP of the step-time benchmark, 10.5 M parameters, trained by SGD with momentum. A turn is a number of
steps with a checkpoint after the first of every ``--every``. It is timed until its last checkpoint is on disk, so the
time includes all that saving costs. The modes take turns; the table gives the median ratio to the mode without
checkpoints in the same turn.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import disttrain
from benchmarks.common.machine import PROGRAM, describe_machine, load_average
from benchmarks.common.options import RESULTS, LabelOption, OutputOption, parse_compressor, parse_rate
from benchmarks.common.results import make_table, write_result
from benchmarks.common.statistics import ratio_to_baseline
from benchmarks.network import ShapedNetwork, rank_environment
from benchmarks.speed.models import make_batch, mlp, sgd
from disttrain.comm import Communicator
from disttrain.training.checkpoints.contents import Contents
from disttrain.training.checkpoints.folder import prune
from disttrain.training.checkpoints.writer import Writer

MODES = ("none", "background", "synchronous")


class TrainingLoop:
    """One rank's model and optimizer, with checkpoints written as the trainer writes them."""

    def __init__(self, comm: Communicator, compressor: dict[str, Any], folder: Path) -> None:
        self.comm, self.folder = comm, folder
        self.model = mlp().to(comm.device)
        self.optimizer = disttrain.DistributedOptimizer(sgd(self.model), self.model, comm=comm, compressor=compressor)
        self.inputs, self.targets = (part.to(comm.device) for part in make_batch("mlp", comm.rank))
        self.writer = Writer(comm, max_in_flight=1)
        self.num_steps, self.num_bytes = 0, 0

    def step(self) -> None:
        self.num_steps += 1
        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(self.model(self.inputs), self.targets).backward()
        self.optimizer.step()

    def save(self) -> None:
        if self.writer.num_in_flight:
            self.writer.wait_for_oldest()
        contents = Contents.collect(self.comm, self.model, self.optimizer, {})
        self.num_bytes = sum(tensor.nbytes for tensors in contents.files.values() for tensor in tensors.values())
        facts = {"run": "0" * 32, "step": self.num_steps, "progress": {}, "config": {}}
        self.writer.start(self.folder, "bench", contents, facts, on_complete=lambda: prune(self.folder, 2, None))

    def run_turn(self, mode: str, num_steps: int, every: int) -> float:
        """Return the seconds per step over the whole turn."""
        self.step()
        self.comm.barrier()
        started = time.perf_counter()
        for step in range(num_steps):
            self.step()
            if mode != "none" and step % every == 0:
                self.save()
                if mode == "synchronous":
                    self.writer.wait_for_oldest()
        while self.writer.num_in_flight:
            self.writer.wait_for_oldest()
        self.comm.barrier()
        return (time.perf_counter() - started) / num_steps


def main(
    every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 10,
    turns: Annotated[int, typer.Option(min=2, help="Turns of each mode.")] = 12,
    checkpoints: Annotated[int, typer.Option(min=1, help="In a turn.")] = 5,
    compressor: Annotated[str, typer.Option(help="dense, topk:ratio=0.01, ...")] = "topk:ratio=0.01",
    folder: Annotated[Path | None, typer.Option(help="Where to write; shared by all workers.")] = None,
    output: OutputOption = RESULTS,
    label: LabelOption = "",
    rate: Annotated[
        str | None, typer.Option(help="Start workers on a network with links of this rate: 1gbit, none, ...")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="With --rate: one on each host.")] = 4,
) -> None:
    """Time training steps with and without checkpoints."""
    if rate is not None and "RANK" not in os.environ:
        raise typer.Exit(start_on_hosts(parse_rate(rate), workers))
    with disttrain.init() as comm:
        num_local_workers = comm.local_size if rate is None else comm.world_size
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_local_workers))
        machine = describe_machine()
        directory = comm.broadcast_object(tempfile.mkdtemp(prefix="disttrain-", dir=folder) if comm.rank == 0 else None)
        training = TrainingLoop(comm, parse_compressor(compressor), Path(directory))
        seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        try:
            training.run_turn("background", every, every)  # warms up kernels, buffers and the page cache
            for turn in range(turns):
                for mode in MODES if turn % 2 == 0 else reversed(MODES):
                    seconds[mode].append(training.run_turn(mode, every * checkpoints, every))
        finally:
            training.writer.close()
            comm.barrier()
            if comm.rank == 0:
                shutil.rmtree(directory)
        if comm.rank == 0:
            settings = {"every": every, "compressor": compressor, "workers": comm.world_size, "rate": rate or "own"}
            settings |= {"checkpoints": checkpoints, "megabytes": training.num_bytes / 1e6}
            report(seconds, settings, machine, output, label)


def start_on_hosts(rate_mbit: float | None, workers: int) -> int:
    """Run this command as a worker on every host of a shaped network; return 1 if one fails, else 0."""
    with ShapedNetwork(workers, rate_mbit, time_limit=1800) as network:
        command = [sys.executable, *PROGRAM[1:], *sys.argv[1:]]
        rendezvous: dict[str, Any] = {"master": network.hosts[0], "port": 29400, "interface": network.interface}
        processes = [
            network.run(host, command, rank_environment(rank, workers, **rendezvous))
            for rank, host in enumerate(network.hosts)
        ]
        return int(any(process.wait() for process in processes))


def report(
    seconds: dict[str, list[float]], settings: dict[str, Any], machine: dict[str, Any], output: Path, label: str
) -> None:
    rows: list[dict[str, Any]] = []
    for mode, times in seconds.items():
        ratio = ratio_to_baseline(times, seconds["none"])
        milliseconds = float(np.median(times)) * 1e3
        rows.append(
            {"way": mode, "milliseconds": milliseconds, "ratio": ratio.median, "low": ratio.low, "high": ratio.high}
        )
    title = "{megabytes:.0f} MB (rank 0's part) every {every} steps; {workers} workers, {rate} links, {compressor}"
    table = make_table(
        title.format(**settings),
        ("checkpoints",),
        ("ms per step", "ratio to none", "95 % interval"),
        (
            (
                row["way"],
                f"{row['milliseconds']:.1f}",
                f"{row['ratio']:.3f}",
                f"{row['low']:.3f} - {row['high']:.3f}",
            )
            for row in rows
        ),
    )
    machine["load_average_after"] = load_average()
    result = {"machine": machine, "settings": settings, "rows": rows, "seconds": seconds}
    write_result(table, result, output, "checkpointing", label)


def summarize_result(result: dict[str, Any]) -> str:
    """Return the ratios to steps without checkpoints."""
    settings = result["settings"]
    ratios = ", ".join(f"{row['ratio']:.3f} {row['way']}" for row in result["rows"] if row["way"] != "none")
    workers = f"{settings['workers']} worker{'s' if settings['workers'] > 1 else ''}"
    return (
        f"{settings['megabytes']:.0f} MB every {settings['every']} steps, {workers}, {settings['compressor']}: "
        f"{ratios} of a step without checkpoints"
    )
