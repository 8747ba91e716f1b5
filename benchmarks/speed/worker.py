"""One worker of the step-time benchmark: ``python -m benchmarks.speed.worker``, started by ``WorkerGroup``."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

import disttrain
from benchmarks.speed.frameworks import FRAMEWORKS, Framework, TrainingSetup
from benchmarks.speed.models import MODELS, OPTIMIZERS, make_batch
from benchmarks.speed.worker_group import serve

Batch = tuple[torch.Tensor, torch.Tensor]


def time_steps(
    framework: Framework, setup: TrainingSetup, batch: Batch, num_warmup: int, num_steps: int
) -> dict[str, Any]:
    """Train on one batch.

    Returns:
        ``seconds``: of each step after the first ``num_warmup``; ``cpu_seconds``: processor time of these steps, on
        average; ``sent_bytes``: of the last step, None if the framework does not count them.
    """
    inputs, targets = batch
    times: list[float] = []
    cpu_start = 0.0
    framework.barrier()
    for step in range(num_warmup + num_steps):
        if step == num_warmup:
            cpu_start = _cpu_seconds()
        start = time.perf_counter()
        setup.optimizer.zero_grad()
        F.cross_entropy(setup.module(inputs), targets).backward()
        setup.optimizer.step()
        times.append(time.perf_counter() - start)
    cpu_seconds = _cpu_seconds() - cpu_start if num_steps else 0.0
    optimizer = setup.optimizer
    return {
        "seconds": times[num_warmup:],
        "cpu_seconds": cpu_seconds / max(num_steps, 1),
        "sent_bytes": optimizer.wire.last_step.sent_bytes
        if isinstance(optimizer, disttrain.DistributedOptimizer)
        else None,
    }


def fingerprint(setup: TrainingSetup, batch: Batch) -> dict[str, float]:
    """Return the loss on this rank's batch and the sum of all parameters, to compare frameworks by."""
    with torch.no_grad():
        loss = F.cross_entropy(setup.model(batch[0]), batch[1]).item()
        return {"loss": loss, "parameters": sum(p.double().sum().item() for p in setup.model.parameters())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--framework", choices=list(FRAMEWORKS), required=True)
    parser.add_argument("--model", choices=list(MODELS), required=True)
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="sgd")
    parser.add_argument("--bucket-mb", type=float, default=None)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--socket", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    framework = FRAMEWORKS[arguments.framework]()
    batch = make_batch(arguments.model, framework.rank)
    setups: list[TrainingSetup] = []

    def prepare(setting: dict[str, Any]) -> dict[str, Any]:
        torch.manual_seed(0)
        model = MODELS[arguments.model]()
        inner = OPTIMIZERS[arguments.optimizer](model)
        setups.append(framework.prepare(model, inner, setting, arguments.bucket_mb))
        return {}

    def step(setup: int, num_warmup: int, num_steps: int) -> dict[str, Any]:
        return time_steps(framework, setups[setup], batch, num_warmup, num_steps)

    commands: dict[str, Callable[..., Any]] = {
        "prepare": prepare,
        "step": step,
        "fingerprint": lambda setup: fingerprint(setups[setup], batch),
    }
    serve(arguments.socket, framework.rank, commands)
    framework.close()


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
