from __future__ import annotations

import errno
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from disttrain.comm import Communicator, SingleProcess, simulate
from disttrain.errors import UserError
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.training.checkpoints import contents as checkpoint
from disttrain.training.checkpoints import folder as checkpoint_folder
from disttrain.training.checkpoints import writer as checkpoint_writer
from disttrain.training.checkpoints.manifest import FileEntry
from disttrain.training.run import random_state
from tests.support import checkpoints


class Tied(nn.Module):
    """Two modules that share a parameter, one that is never used, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.second(self.first(x).tanh())


def make(comm: Communicator, **options: Any) -> tuple[Tied, DistributedOptimizer]:
    model = Tied()
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    compressor = {"name": "topk", "ratio": 0.2, "min_numel": 1, **options}
    return model, DistributedOptimizer(inner, model, comm=comm, compressor=compressor)


def train(comm: Communicator, model: Tied, optimizer: DistributedOptimizer, num_steps: int) -> None:
    for step in range(num_steps):
        optimizer.zero_grad()
        model(torch.full((2, 4), 0.1 + comm.rank + step)).square().sum().backward()
        optimizer.step()


def save(comm: Communicator, folder: Path, made: tuple[Tied, DistributedOptimizer], step: int, keep: int = 2) -> Path:
    return checkpoints.save(comm, folder, *made, step, progress={"step": step}, keep=keep)


def test_everything_returns(tmp_path: Path) -> None:
    def first(comm: Communicator) -> Any:
        made = make(comm)
        train(comm, *made, 3)
        path = save(comm, tmp_path, made, 3)
        train(comm, *made, 2)
        return path, made[0].state_dict(), made[1].state_dict()

    def second(comm: Communicator) -> Any:
        model, optimizer = make(comm)
        path, manifest = checkpoint_folder.find(tmp_path)
        assert manifest.progress == {"step": 3}
        assert checkpoint.load(path, manifest, comm, model, optimizer)
        assert model.second.weight is model.first.weight
        train(comm, model, optimizer, 2)
        return path, model.state_dict(), optimizer.state_dict()

    for expected, got in zip(simulate(2, first), simulate(2, second), strict=True):
        assert got[0] == expected[0]
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0)
        torch.testing.assert_close(got[2], expected[2], rtol=0, atol=0)


def test_hyper_parameters_are_the_present_ones(tmp_path: Path) -> None:
    comm = SingleProcess()
    made = make(comm)
    train(comm, *made, 1)
    save(comm, tmp_path, made, 1)
    model, optimizer = make(comm)
    optimizer.param_groups[0]["lr"] = 0.7
    checkpoint.load(*checkpoint_folder.find(tmp_path), comm, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.7


def test_optimizer_state_is_named_by_parameter(tmp_path: Path) -> None:
    comm = SingleProcess()
    made = make(comm)
    train(comm, *made, 1)
    path = save(comm, tmp_path, made, 1)
    names = load_file(path / "optimizer.safetensors").keys()
    assert {"first.weight/exp_avg", "second.bias/exp_avg_sq"} <= names
    assert not any(name.startswith("unused") for name in names)


@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize("file", ["rank", "finalize"])
def test_a_failed_save_fails_on_all_ranks_and_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_rank: int, file: str
) -> None:
    entry_of, finalize = checkpoint_writer.entry_of, checkpoint_folder.finalize

    def full(path: Path) -> FileEntry:
        if file == "rank" and path.name == f"rank-{failing_rank:05d}.safetensors" and "0002" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return entry_of(path)

    def failing(partial: Path, final: Path, *args: Any) -> None:
        if file == "finalize" and final.name == "step-00000002":
            (partial / "manifest.json").write_text("{")
            raise OSError(errno.ENOSPC, "No space left on device", str(final))
        finalize(partial, final, *args)

    monkeypatch.setattr(checkpoint_writer, "entry_of", full)
    monkeypatch.setattr(checkpoint_folder, "finalize", failing)

    def run(comm: Communicator) -> str:
        made = make(comm)
        train(comm, *made, 1)
        save(comm, tmp_path, made, 1)
        with pytest.raises(UserError, match="No space left on device") as caught:
            save(comm, tmp_path, made, 2)
        save(comm, tmp_path, made, 3)
        return str(caught.value)

    messages = simulate(2, run)
    assert messages[0] == messages[1]
    assert [path.name for path in checkpoint_folder.checkpoints_in(tmp_path)] == ["step-00000001", "step-00000003"]


def test_a_folder_that_not_all_hosts_share_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "_VISIBLE_WITHIN", 0.1)

    def run(comm: Communicator) -> None:
        save(comm, tmp_path / str(comm.rank), make(comm), 1)

    with pytest.raises(UserError, match="set output to a folder that all hosts share"):
        simulate(2, run)


@pytest.mark.parametrize("damage", ["no manifest", "half manifest", "bit", "short", "missing", "format", "list"])
def test_the_newest_whole_checkpoint_is_found(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    comm = SingleProcess()
    made = make(comm)
    good, bad = (save(comm, tmp_path, made, step) for step in (9, 10))
    manifest, model = bad / "manifest.json", bad / "model.safetensors"
    match damage:
        case "no manifest":
            manifest.unlink()
        case "half manifest":
            manifest.write_text(manifest.read_text()[:50])
        case "bit":
            content = bytearray(model.read_bytes())
            content[-1] ^= 1
            model.write_bytes(content)
        case "short":
            model.write_bytes(model.read_bytes()[:-1])
        case "missing":
            (bad / "rank-00000.safetensors").unlink()
        case "format":
            manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
        case "list":
            manifest.write_text("[]")
    assert checkpoint_folder.newest(tmp_path) == checkpoint_folder.verified(good)
    assert str(bad) in caplog.text
    with pytest.raises(UserError, match="step-00000010"):
        checkpoint_folder.find(bad)


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    made = make(SingleProcess())
    for step in (99_999_999, 100_000_000):
        save(SingleProcess(), tmp_path, made, step)
    found = checkpoint_folder.newest(tmp_path)
    assert found is not None
    assert found.manifest.step == 100_000_000


def test_old_checkpoints_are_deleted_and_leftovers_do_not_disturb(tmp_path: Path) -> None:
    comm = SingleProcess()
    made = make(comm)
    left = tmp_path / ".step-00000003.killed.partial"
    left.mkdir()
    (left / "rank-00007.safetensors").write_bytes(b"of a killed run")
    for step in range(1, 5):
        save(comm, tmp_path, made, step)
    assert left.exists(), "another run's"
    checkpoint_folder.remove_partial(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000003", "step-00000004"}
    shutil.rmtree(tmp_path)
    assert checkpoint_folder.newest(tmp_path) is None


def test_a_broken_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    comm = SingleProcess()
    made = make(comm)
    path = save(comm, tmp_path, made, 1)
    (path / "manifest.json").unlink()
    assert save(comm, tmp_path, made, 1) == path
    assert checkpoint_folder.find(path).path == path


def test_random_generators_return() -> None:
    def draw() -> list[Any]:
        return [torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.random(), random.gauss(0, 1)]

    random_state.seed_everything(3, 1)
    draw()
    tensors, rest = random_state.get_state(torch.device("cpu"))
    expected = [draw(), draw()]
    random_state.seed_everything(4)
    assert draw() != expected[0]
    random_state.set_state(tensors, rest, torch.device("cpu"))
    assert [draw(), draw()] == expected


def test_seeds_depend_on_all_numbers_of_the_key() -> None:
    drawn = []
    for key in [(0,), (1,), (0, 1), (1, 0), (0, 1, 0)]:
        random_state.seed_everything(*key)
        drawn.append((torch.rand(1).item(), np.random.random(), random.random()))
    assert len({value for values in drawn for value in values}) == 15
