from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain import tasks
from disttrain.errors import UserError
from disttrain.tasks import Task
from disttrain.training import config as configs
from tests.support.workers import ROOT

SPECS: dict[str, dict[str, Any]] = {
    "digits": {"name": "digits", "width": 4},
    "digits with batch norm": {"name": "digits", "width": 4, "batch_norm": True},
    "text": {
        "name": "text",
        "path": f"{ROOT}/disttrain/*/*.py",
        "held_out": 0.3,
        "width": 8,
        "heads": 2,
        "context": 16,
    },
    "example": {"name": "docs.examples.wine:Wine"},
}


def batch_of(task: Task, data: Any, indices: list[int]) -> Any:
    samples = data.__getitems__(indices) if hasattr(data, "__getitems__") else [data[index] for index in indices]
    return task.collate(samples)


@pytest.mark.parametrize("name", ["digits", "text"])
def test_label_smoothing_applies_to_the_training_loss_only(name: str) -> None:
    """(1 - s) x cross-entropy + s x the mean over classes of the negative log-probability (Szegedy et al. 2016)."""
    plain, smooth = (tasks.registry.build({**SPECS[name], "label_smoothing": share}) for share in (0.0, 0.2))
    model = plain.build_model().double().eval()
    batch = batch_of(plain, plain.train_data(), [0, 1, 2])
    inputs = batch[0].double() if isinstance(batch, tuple) else batch[:, :-1]
    uniform = -model(inputs).log_softmax(-1).mean()
    batch = (inputs, batch[1]) if isinstance(batch, tuple) else batch
    expected = 0.8 * plain.loss(model, batch) + 0.2 * uniform
    torch.testing.assert_close(smooth.loss(model, batch), expected, rtol=1e-12, atol=0)
    assert smooth.evaluate(model, batch) == plain.evaluate(model, batch)


@pytest.mark.parametrize("name", SPECS)
class TestContract:
    """What the trainer requires of every task."""

    def test_the_loss_is_a_mean_over_samples(self, name: str) -> None:
        task = tasks.registry.build(SPECS[name])
        model, data = task.build_model().double().eval(), task.train_data()

        def loss(indices: list[int]) -> float:
            batch = batch_of(task, data, indices)
            if isinstance(batch, tuple):
                batch = tuple(part.double() if part.is_floating_point() else part for part in batch)
            return task.loss(model, batch).item()

        assert loss([0, 1, 2]) == pytest.approx((loss([0]) + loss([1]) + loss([2])) / 3, rel=1e-12)

    def test_metrics_of_parts_add_up(self, name: str) -> None:
        task = tasks.registry.build(SPECS[name])
        model, data = task.build_model().eval().requires_grad_(False), task.eval_data()
        assert data is not None
        whole, *parts = (task.evaluate(model, batch_of(task, data, part)) for part in ([0, 1, 2], [0], [1, 2]))
        assert whole
        for metric, (total, count) in whole.items():
            assert float(total) == pytest.approx(sum(float(part[metric][0]) for part in parts), rel=1e-5)
            assert count == sum(part[metric][1] for part in parts)

    def test_the_same_seed_builds_the_same_model_and_data(self, name: str) -> None:
        made = []
        for _ in range(2):
            task = tasks.registry.build(SPECS[name])
            torch.manual_seed(5)
            made.append((task.build_model().state_dict(), batch_of(task, task.train_data(), [0, 3])))
        torch.testing.assert_close(made[0], made[1], rtol=0, atol=0)

    def test_a_model_learns(self, name: str) -> None:
        task = tasks.registry.build(SPECS[name])
        torch.manual_seed(0)
        model, data = task.build_model(), task.train_data()
        batch = batch_of(task, data, list(range(32)))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        first = task.loss(model, batch).item()
        for _ in range(30):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
        assert task.loss(model, batch).item() < 0.8 * first


def test_held_out_digits_are_fixed_and_balanced() -> None:
    task = tasks.registry.build("digits")
    train, held_out = task.train_data(), task.eval_data()
    assert (len(train), len(held_out)) == (1437, 360)  # type: ignore[arg-type]
    counts = held_out.tensors[1].bincount()  # type: ignore[union-attr]
    assert counts.min() >= 35
    assert counts.max() <= 37
    seen = {image.numpy().tobytes() for image in train.tensors[0]}  # type: ignore[attr-defined]
    repeated = sum(image.numpy().tobytes() in seen for image in held_out.tensors[0])  # type: ignore[union-attr]
    assert repeated == 0


def test_registered_tasks_and_import_paths_survive_a_round_trip() -> None:
    for spec in SPECS.values():
        task = tasks.registry.build(spec)
        name = tasks.registry.name_of(task)
        assert name == spec["name"]
        assert tasks.registry.build({"name": name, **task.model_dump()}) == task


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("docs/**/*.yaml")]), ids=lambda p: p.name
)
def test_every_config_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = configs.load(path)
    assert config.name == path.stem
    for world_size in (1, 2, 4):
        config.check_world_size(world_size)


MODULES = {
    "broken.py": "1 / 0\n",
    "needs.py": "import not_installed_anywhere\n",
    "partial.py": "from disttrain.tasks import Task\nclass Partial(Task):\n    def loss(self, model, batch): ...\n",
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken:Task", "importing broken fails: ZeroDivisionError: division by zero"),
        ("needs:Task", "it imports 'not_installed_anywhere', which is not installed"),
        ("partial:Partial", "Partial must define build_model, train_data"),
        ("absent.module:Task", "no module 'absent' in .* \\(the current directory\\) or on PYTHONPATH"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    for file, content in MODULES.items():
        (tmp_path / file).write_text(content)
        monkeypatch.delitem(sys.modules, Path(file).stem, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UserError, match=message):
        tasks.registry.build(name)
