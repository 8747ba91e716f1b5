"""What saving costs a training step: none, in the background, and written while training waits, by turns in one run.

    python benchmarks/checkpointing.py --rate 1gbit --workers 4 --compressor dense
    torchrun --nproc-per-node 2 benchmarks/checkpointing.py --compressor topk:ratio=0.01 --folder /some/disk

The model is the MLP of the step-time bench, 10.5 M parameters, trained by SGD with momentum. A turn is some steps, with
a checkpoint behind the first of every ``--every``; it is timed until the last checkpoint is on the disk. Turns of all
ways alternate. What counts is the ratio to the way without checkpoints in the same turn.
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
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import disttrain  # noqa: E402
from benchmarks.contenders import make_batch, mlp, sgd  # noqa: E402
from benchmarks.machine import describe_machine, show_and_write  # noqa: E402
from benchmarks.network import ShapedNetwork, rank_environment  # noqa: E402
from benchmarks.step_time import interval_of_median, parse_compressor, parse_rate  # noqa: E402
from disttrain.comm import Communicator  # noqa: E402
from disttrain.training.checkpoints.contents import Contents  # noqa: E402
from disttrain.training.checkpoints.folder import prune  # noqa: E402
from disttrain.training.checkpoints.writer import Writer  # noqa: E402

WAYS = ("none", "background", "synchronous")


class Training:
    """One rank's model, and a step of it; ``save`` as a run saves."""

    def __init__(self, comm: Communicator, compressor: dict[str, Any], folder: Path) -> None:
        self.comm, self.folder = comm, folder
        self.model = mlp().to(comm.device)
        self.optimizer = disttrain.DistributedOptimizer(sgd(self.model), self.model, comm=comm, compressor=compressor)
        self.inputs, self.targets = (part.to(comm.device) for part in make_batch("mlp", comm.rank))
        self.writer = Writer(comm, in_flight=1)
        self.num_steps, self.num_bytes = 0, 0

    def step(self) -> None:
        self.num_steps += 1
        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(self.model(self.inputs), self.targets).backward()
        self.optimizer.step()

    def save(self) -> None:
        if self.writer.num_in_flight:
            self.writer.settle()
        contents = Contents.of(self.comm, self.model, self.optimizer, {})
        self.num_bytes = sum(tensor.nbytes for tensors in contents.files.values() for tensor in tensors.values())
        facts = {"run": "0" * 32, "step": self.num_steps, "progress": {}, "config": {}}
        self.writer.take(self.folder, "bench", contents, facts, keep=lambda: prune(self.folder, 2, None))

    def turn(self, way: str, num_steps: int, every: int) -> float:
        """Seconds a step, over the whole turn."""
        self.step()
        self.comm.barrier()
        started = time.perf_counter()
        for step in range(num_steps):
            self.step()
            if way != "none" and step % every == 0:
                self.save()
                if way == "synchronous":
                    self.writer.settle()
        while self.writer.num_in_flight:
            self.writer.settle()
        self.comm.barrier()
        return (time.perf_counter() - started) / num_steps


def main(
    every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 10,
    turns: Annotated[int, typer.Option(min=2, help="Turns of each way.")] = 12,
    checkpoints: Annotated[int, typer.Option(min=1, help="In a turn.")] = 5,
    compressor: Annotated[str, typer.Option(help="dense, topk:ratio=0.01, ...")] = "topk:ratio=0.01",
    folder: Annotated[Path | None, typer.Option(help="Where to write, seen by all workers.")] = None,
    output: Annotated[Path, typer.Option(help="Directory of the result files.")] = ROOT / "benchmarks" / "results",
    label: Annotated[str, typer.Option(help="Goes into the result files' names.")] = "",
    rate: Annotated[str | None, typer.Option(help="Start workers on a network of such links: 1gbit, none, ...")] = None,
    workers: Annotated[int, typer.Option(min=1, help="With --rate: one on each host.")] = 4,
) -> None:
    """Time training steps with and without checkpoints."""
    if rate is not None and "RANK" not in os.environ:
        raise typer.Exit(start_on_hosts(parse_rate(rate), workers))
    with disttrain.init() as comm:
        on_this_machine = comm.local_size if rate is None else comm.world_size
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // on_this_machine))
        machine = describe_machine()
        made = comm.broadcast_object(tempfile.mkdtemp(prefix="disttrain-", dir=folder) if comm.rank == 0 else None)
        training = Training(comm, parse_compressor(compressor), Path(made))
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        try:
            training.turn("background", every, every)  # warm: kernels, buffers, the page cache
            for turn in range(turns):
                for way in WAYS if turn % 2 == 0 else reversed(WAYS):
                    seconds[way].append(training.turn(way, every * checkpoints, every))
        finally:
            training.writer.close()
            comm.barrier()
            if comm.rank == 0:
                shutil.rmtree(made)
        if comm.rank == 0:
            settings = {"every": every, "compressor": compressor, "workers": comm.world_size, "rate": rate or "own"}
            settings |= {"checkpoints": checkpoints, "megabytes": training.num_bytes / 1e6}
            report(seconds, settings, machine, output, label)


def start_on_hosts(rate_mbit: float | None, workers: int) -> int:
    """Run this very program as a worker on every host of a shaped network; 1 if one of them fails."""
    with ShapedNetwork(workers, rate_mbit, time_limit=1800) as network:
        meeting: dict[str, Any] = {"master": network.hosts[0], "port": 29400, "interface": network.interface}
        processes = [
            network.run(host, [sys.executable, *sys.argv], rank_environment(rank, workers, **meeting))
            for rank, host in enumerate(network.hosts)
        ]
        return int(any(process.wait() for process in processes))


def report(
    seconds: dict[str, list[float]], settings: dict[str, Any], machine: dict[str, Any], output: Path, label: str
) -> None:
    title = "{megabytes:.0f} MB (rank 0's part) every {every} steps; {workers} workers, {rate} links, {compressor}"
    table = Table(title=title.format(**settings))
    for column in ("checkpoints", "ms a step", "ratio to none", "95 % interval"):
        table.add_column(column, justify="left" if column == "checkpoints" else "right")
    rows = []
    for way in WAYS:
        ratios = np.array(seconds[way]) / np.array(seconds["none"])
        low, high = interval_of_median(ratios)
        milliseconds, ratio = float(np.median(seconds[way])) * 1e3, float(np.median(ratios))
        rows.append({"way": way, "milliseconds": milliseconds, "ratio": ratio, "low": low, "high": high})
        table.add_row(way, f"{milliseconds:.1f}", f"{ratio:.3f}", f"{low:.3f} - {high:.3f}")
    machine["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    result = {"machine": machine, "settings": settings, "rows": rows, "seconds": seconds}
    path = show_and_write(table, result, output, "checkpointing", label)
    Console(stderr=True).print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
