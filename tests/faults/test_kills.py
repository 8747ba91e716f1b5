"""A few of the kills of ``make faults``, one run on each engine, and that the harness sees what is wrong."""

from __future__ import annotations

import functools
import random
import shutil
from pathlib import Path

import pytest

from disttrain.comm import simulate
from tests.faults.kills import ENGINES, Chain, Report, table, uninterrupted
from tests.support.runs import make_config, train
from tests.support.workers import unavailable


@functools.cache
def whole(folder: Path) -> Path:
    return uninterrupted(folder / "whole", "top-k")


@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("engine", "seed"), [*zip(ENGINES, (3, 2, 1), strict=True)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, engine: str, seed: int
) -> None:
    if reason := unavailable(engine):
        pytest.skip(reason)
    report = Report()
    Chain(tmp_path / "chain", engine, "top-k", whole(tmp_path_factory.getbasetemp()), random.Random(seed)).go(1, report)
    assert report.wrong == []
    assert report.num_ended == 1
    assert [kill.where for kill in report.kills][1:] == ["end"], "the seed is to be one that kills"
    assert f"| {engine} | 1 |" in table(report, seed)


@pytest.mark.usefixtures("one_thread")
def test_a_checkpoint_that_verifies_and_is_wrong_is_seen(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "chain", "torch", "top-k", tmp_path / "whole", random.Random(0))
    for folder, seed in ((chain.folder, 0), (chain.expected, 1)):
        config = make_config(folder, name="run", seed=seed, max_steps=2, checkpoint={"every_steps": 1})
        simulate(2, lambda comm, config=config: train(config, comm))
    assert len([*chain.wrongs()]) == 2
    shutil.rmtree(chain.expected)
    shutil.copytree(chain.folder, chain.expected)
    assert [*chain.wrongs()] == []
    (chain.folder / "run/checkpoints/step-00000002/model.safetensors").write_bytes(b"broken")
    assert [*chain.wrongs()] == [], "broken, and known to be"


def test_moments_are_those_of_the_seed(tmp_path: Path) -> None:
    one, other = (Chain(tmp_path / name, "torch", "fp16", tmp_path, random.Random(5)) for name in "ab")
    assert [one.bomb() for _ in range(20)] == [other.bomb() for _ in range(20)]
    assert {one.bomb()["where"] for _ in range(50)} == {"start", "step", "evaluation", "checkpoint"}
