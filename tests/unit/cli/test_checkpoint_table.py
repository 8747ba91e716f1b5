"""``disttrain checkpoints``."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from disttrain.cli.checkpoint_table import show
from disttrain.comm import SingleProcess
from disttrain.errors import UserError
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.training.checkpoints.folder import Best, checkpoints_in
from tests.support import checkpoints

BEST = Best(metric="error", mode="min")
ERRORS = {1: 0.5, 2: 0.2, 3: 0.3, 4: 0.25}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has saved four checkpoints, of which the second is the best."""
    model = torch.nn.Linear(3, 2)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=SingleProcess())
    config = {"checkpoint": {"keep_best": BEST.model_dump()}}
    for step, error in ERRORS.items():
        folder, metrics = tmp_path / "run/checkpoints", {"error": error}
        checkpoints.save(
            SingleProcess(), folder, model, optimizer, step, keep=9, metrics=metrics, config=config, best=BEST
        )
    return tmp_path / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints_in(run / "checkpoints")]


def shown(path: Path, **options: object) -> str:
    text = io.StringIO()
    show(path, Console(file=text, width=200), **options)  # type: ignore[arg-type]
    return text.getvalue()


def test_a_table_says_what_is_there_which_is_best_and_what_is_broken(run: Path) -> None:
    flip(run / "checkpoints/step-00000003/model.safetensors")
    by_size = shown(run).splitlines()
    assert sum("complete, by size" in line for line in by_size) == 4
    lines = shown(run, verify=True).splitlines()
    assert [line for line in lines if "best" in line][1:] == [line for line in lines if "error 0.2 " in line]
    assert any("│    3 │" in line and "model.safetensors is not what was written" in line for line in lines)
    assert shown(run / "checkpoints", verify=True).splitlines()[1:] == lines[1:]


def test_json_has_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints/step-00000001/rank-00000.safetensors").unlink()
    show(run, Console(), as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == [None, 2, 3, 4]
    assert [row["is_best"] for row in rows] == [False, True, False, False]
    assert rows[0]["problem"] == "is incomplete: rank-00000.safetensors is missing"
    assert rows[3]["metrics"] == {"error": 0.25}
    assert {"disttrain", "torch", "python"} == rows[3]["versions"].keys()


def test_pruning_keeps_the_newest_and_the_best(run: Path) -> None:
    shown(run, keep=1)
    assert steps(run) == [2, 4]


def test_pruning_never_deletes_the_last_good_one(run: Path) -> None:
    for step in (2, 3, 4):
        flip(run / f"checkpoints/step-0000000{step}/model.safetensors")
    shown(run, keep=1)
    assert steps(run) == [1]
    flip(run / "checkpoints/step-00000001/model.safetensors")
    with pytest.raises(UserError, match=r"step-00000001' is damaged"):
        shown(run, keep=1, verify=True)
    assert steps(run) == [1]


def test_a_named_one_that_is_broken_is_an_error(run: Path) -> None:
    broken = run / "checkpoints/step-00000002"
    flip(broken / "model.safetensors")
    with pytest.raises(UserError, match=r"step-00000002' is damaged: model.safetensors is not what was written"):
        shown(broken, verify=True)
    assert "complete, every byte" in shown(run / "checkpoints/step-00000001", verify=True)


@pytest.mark.parametrize(("path", "message"), [("nowhere", "holds no checkpoint"), ("step-1", "does not exist")])
def test_missing_checkpoints_are_reported(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        shown(tmp_path / path)


def test_one_checkpoint_alone_is_not_pruned(run: Path) -> None:
    with pytest.raises(UserError, match="--prune needs the folder of a run"):
        shown(run / "checkpoints/step-00000001", keep=1)
    assert steps(run) == [1, 2, 3, 4]
