from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from disttrain import load_weights
from disttrain.comm import SingleProcess, simulate
from disttrain.errors import UserError
from disttrain.training.start_from import StartFrom
from tests.support.runs import make_config, train


class Net(nn.Module):
    """A body with batch statistics, a head, and an output that shares its weight with the input."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, classes)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.body[0].weight


def make(seed: int, classes: int = 3) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(classes)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one if name in other and torch.equal(one[name], other[name])}


SOURCE = make(1)


def saved(folder: Path, kind: str) -> Path:
    state = values(SOURCE)
    path = folder / {"safetensors": "model.safetensors", "sharded": "."}.get(kind, "weights.pt")
    if kind == "safetensors":
        save_file({name: tensor for name, tensor in state.items() if name != "tied.weight"}, path)
    elif kind == "sharded":
        names = sorted(state)
        for index, part in enumerate((names[:4], names[4:])):
            save_file({name: state[name] for name in part}, folder / f"{index}.safetensors")
        index_of = {name: f"{int(name in names[4:])}.safetensors" for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index_of}))
    else:
        wrapped = {"torch": state, "wrapped": {"epoch": 3, "state_dict": state}}[kind]
        torch.save(wrapped, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "torch", "wrapped"])
def test_every_kind_of_file_gives_the_same_weights(tmp_path: Path, kind: str) -> None:
    model = make(2).double()
    match = load_weights(model, saved(tmp_path, kind))
    assert not match.problems
    assert all(torch.equal(value, values(SOURCE)[name].to(value.dtype)) for name, value in values(model).items())
    assert model.head.weight.dtype == torch.float64


def test_a_new_head_stays_fresh(tmp_path: Path) -> None:
    model = make(2, classes=5)
    before = values(model)
    match = load_weights(model, saved(tmp_path, "torch"), reset=["head.*"])
    assert match.reset == ["head.weight", "head.bias"]
    assert {"head.weight", "head.bias"} <= equal(before, values(model))
    assert equal(values(SOURCE), values(model)) == values(model).keys() - {"head.weight", "head.bias"}


def test_names_are_changed_by_prefix(tmp_path: Path) -> None:
    renamed = {f"module.{name.replace('body.', 'trunk.')}": value for name, value in values(SOURCE).items()}
    save_file(renamed, tmp_path / "w.safetensors")
    model = make(2)
    load_weights(model, tmp_path / "w.safetensors", rename={"module.": "", "module.trunk.": "body."})
    assert equal(values(SOURCE), values(model)) == values(model).keys()


def test_what_does_not_fit_is_reported_and_refused_unless_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = values(SOURCE)
    del state["body.0.bias"]
    state["extra"] = torch.zeros(1)
    state["body.1.num_batches_tracked"] = torch.tensor(1.5)  # no integer
    save_file(state, tmp_path / "w.safetensors")
    model = make(2, classes=5)
    before = values(model)
    with pytest.raises(UserError) as caught:
        load_weights(model, tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "not in the file: body.0.bias;",
        "not in the model: extra;",
        "head.weight (float32 [3, 4] in the file, float32 [5, 4] in the model)",
        "body.1.num_batches_tracked (float32 [] in the file, int64 [] in the model)",
        "set strict to false",
    ):
        assert part in message
    assert equal(before, values(model)) == before.keys(), "nothing was loaded"
    with caplog.at_level(logging.INFO, logger="disttrain"):
        match = load_weights(model, tmp_path / "w.safetensors", strict=False)
    assert match.problems in caplog.text
    assert match.missing == ["body.0.bias"]
    fresh = {"body.0.bias", "head.weight", "head.bias", "body.1.num_batches_tracked"}
    assert equal(values(SOURCE), values(model)) >= values(model).keys() - fresh
    assert fresh <= equal(before, values(model))


class Unsafe:
    """Something that only unpickling could bring back."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reset": ["haed.*"]}, r"reset pattern 'haed\.\*' matches no parameter; the nearest name is 'head\."),
        ({"rename": {"modul.": ""}}, r"rename 'modul\.': no name in weights .* has this prefix: module\.body"),
        ({}, r"match nothing in the model: the file has .*; rename: \{'module\.': ''\} would match 10"),
        ({"strict": False}, r"match nothing in the model"),
        ({"rename": {"module.head.weight": "x", "module.head.bias": "x"}}, "two tensors .* the same name"),
    ],
)
def test_names_that_match_nothing_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    save_file({f"module.{name}": value for name, value in values(SOURCE).items()}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=message):
        load_weights(make(2), tmp_path / "w.safetensors", **options)


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"a": Unsafe()}, tmp_path / "unsafe.pt")
    torch.save({"step": 3}, tmp_path / "empty.pt")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    (tmp_path / "damaged.pt").write_bytes(b"nothing")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "unsafe.pt": "hold more than tensors",
        "empty.pt": "hold no state dict",
        "damaged.safetensors": "cannot be read",
        "damaged.pt": "not a torch file",
        "folder": "no complete checkpoint, model.safetensors or pytorch",
        "absent.pt": "do not exist",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load_weights(make(2), tmp_path / name)
        assert "\n" not in str(caught.value)


BEST = {"metric": "error", "mode": "min", "patience": 9, "restore_best": True}


@pytest.mark.parametrize(
    "result", [{}, {"average": {"decay": 0.5}}, {"average": {"decay": 0.5}, "early_stopping": BEST}]
)
@pytest.mark.parametrize("folder", ["test", "test/checkpoints", "test/checkpoints/step-00000009"])
def test_a_run_hands_on_the_weights_that_its_result_is_of(tmp_path: Path, result: dict[str, Any], folder: str) -> None:
    _, wanted = train(make_config(tmp_path, task={"batch_norm": True, "num_samples": 52}, **result), SingleProcess())
    config = make_config(
        tmp_path / "next",
        task={"batch_norm": True, "num_samples": 52},
        start_from={"weights": str(tmp_path / folder)},
        optimizer={"name": "sgd", "lr": 1e-300},
        max_steps=1,
    )
    for _, model in simulate(2, lambda comm: train(config, comm)):
        for name, value in wanted.items():
            assert torch.equal(model[name], value) or "running" in name or "num_batches" in name, name


def test_a_run_may_start_from_an_earlier_one_of_its_name_which_an_error_does_not_change(tmp_path: Path) -> None:
    config = make_config(tmp_path, max_steps=2)
    _, wanted = train(config, SingleProcess())
    again = config.model_copy(update={"start_from": StartFrom(weights="nowhere.pt")})
    with pytest.raises(UserError, match="do not exist"):
        train(again, SingleProcess())
    assert not (tmp_path / "test.1").exists()
    again = config.model_copy(update={"start_from": StartFrom(weights=str(config.directory))})
    assert load_weights(again.task.build_model(), config.directory).loaded
    seen: list[torch.Tensor] = []
    train(again, SingleProcess(), lambda trainer: seen.append(trainer.model[0].weight.detach().clone()))
    assert torch.equal(seen[0], wanted["0.weight"])


def test_ranks_start_from_the_same_weights_and_a_resumed_run_from_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(make_config(tmp_path / "first", max_steps=4), SingleProcess())
    weights = {"weights": str(tmp_path / "first/test")}
    changes: dict[str, Any] = {"start_from": weights, "max_steps": 5, "seed": 3}
    _, alone = train(make_config(tmp_path / "alone", **changes), SingleProcess())
    _, fresh = train(make_config(tmp_path / "fresh", **{**changes, "start_from": None}), SingleProcess())
    assert not torch.equal(alone["0.weight"], fresh["0.weight"])
    together = make_config(tmp_path / "together", **changes)
    for _, model in simulate(3, lambda comm: train(together, comm)):
        for name, value in alone.items():
            torch.testing.assert_close(model[name], value, rtol=0, atol=1e-10)

    stopped = make_config(tmp_path / "stopped", **{**changes, "max_steps": 3})
    train(stopped, SingleProcess())
    gone = {**changes, "start_from": {"weights": str(tmp_path / "no longer there")}, "resume": "auto"}
    with caplog.at_level(logging.INFO, logger="disttrain"):
        _, resumed = train(make_config(tmp_path / "stopped", **gone), SingleProcess())
    assert "start_from is not used" in caplog.text
    assert all(torch.equal(resumed[name], value) for name, value in alone.items())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"weights": "nowhere.pt"}, r"weights 'nowhere.pt' do not exist \(on rank 0"),
        ({"weights": "w.safetensors", "strict": False}, "match nothing in the model"),
        ({}, "missing key 'start_from.weights'"),
        ({"weights": "w.safetensors", "freeze": "x"}, "unknown key 'start_from.freeze'"),
    ],
)
def test_all_ranks_report_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"other": torch.zeros(2)}, "w.safetensors")

    def run() -> None:
        config = make_config(tmp_path, start_from=section)
        simulate(2, lambda comm: train(config, comm))

    with pytest.raises(UserError, match=message):
        run()


def test_a_model_without_values_and_a_broken_index_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^'weight' is of a lazy module and has no shape yet"):
        load_weights(nn.LazyLinear(2), saved(tmp_path, "torch"))
    for content in ("{", "[]", '{"weight_map": 3}', "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(UserError, match=r"model.safetensors.index.json' cannot be read: no weight_map"):
            load_weights(make(2), tmp_path)
