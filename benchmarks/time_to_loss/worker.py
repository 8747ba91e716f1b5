"""One worker of the time-to-loss benchmark: ``python -m benchmarks.time_to_loss.worker``."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from benchmarks.speed.frameworks import FRAMEWORKS
from benchmarks.speed.worker_group import serve
from benchmarks.time_to_loss.composition import compressed_by
from benchmarks.time_to_loss.recipe import Recipe, TrainingRun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--framework", choices=list(FRAMEWORKS), required=True)
    parser.add_argument("--recipe", type=json.loads, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--socket", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    framework = FRAMEWORKS[arguments.framework]()
    recipe = Recipe(**arguments.recipe)
    runs: list[TrainingRun] = []

    def prepare(setting: dict[str, Any], seed: int) -> dict[str, Any]:
        model = recipe.build_model(seed)
        setup = framework.prepare(model, recipe.build_optimizer(model), setting, None)
        runs.append(TrainingRun(recipe, setup, framework.rank, arguments.workers, seed, compressed_by(setting)))
        return {}

    def train(run: int, num_steps: int) -> dict[str, Any]:
        framework.barrier()
        return runs[run].train(num_steps)

    def evaluate(run: int) -> dict[str, Any]:
        return {"share": runs[run].evaluate()}

    serve(arguments.socket, framework.rank, {"prepare": prepare, "train": train, "evaluate": evaluate})
    framework.close()


if __name__ == "__main__":
    main()
