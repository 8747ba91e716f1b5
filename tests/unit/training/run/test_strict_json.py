"""All that a run writes is JSON that every parser reads, also where numbers are NaN or infinite."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from disttrain.cli.checkpoint_table import show
from disttrain.comm import SingleProcess
from disttrain.training.checkpoints import manifest as checkpoint_manifest
from disttrain.training.checkpoints.manifest import Manifest
from disttrain.training.run import strict_json
from tests.support.runs import make_config, train
from tests.support.tiny_task import Tiny


def parse(text: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["", "nan", "inf"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)


@given(values)
def test_what_is_encoded_is_decoded_and_what_is_dumped_is_json(value: Any) -> None:
    assert repr(strict_json.decode(parse(json.dumps(strict_json.encode(value))))) == repr(value)
    parse(strict_json.dumps(value))


def test_null_stands_for_numbers_that_are_none() -> None:
    value = {"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf, "d": 2}}
    assert parse(strict_json.dumps(value)) == {"a": [None, [1.5, None]], "b": {"c": None, "d": 2}}


class Lost(Tiny):
    """Its losses and its metric are no numbers, its gradients are."""

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        loss = super().loss(model, batch)
        return loss - loss.detach() + math.nan

    def evaluate(self, model: Any, batch: Any) -> dict[str, tuple[torch.Tensor | float, int]]:
        return {"error": (math.nan, 1), "worst": (math.inf, 1)}


def test_a_run_without_a_finite_number_is_recorded_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {
        "task": {"name": "tests.unit.training.run.test_strict_json:Lost"},
        "schedule": {"name": "reduce_on_plateau", "metric": "loss", "by": "step", "every": 4},
        "checkpoint": {"keep_best": {"metric": "error", "mode": "min"}},
        "early_stopping": {"metric": "error", "mode": "min"},
    }
    train(make_config(tmp_path, epochs=1, **changes), SingleProcess())
    config = make_config(tmp_path, resume="auto", **changes)
    summary, _ = train(config, SingleProcess())
    assert summary["steps"] == 9
    assert math.isnan(summary["metrics"]["error"]), "only what is written has null"
    written = parse((config.directory / "summary.json").read_text())
    assert written["metrics"] == {"error": None, "worst": None}
    records = [parse(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    assert {record["loss"] for record in records if record["kind"] == "train"} == {None}
    paths = sorted((config.directory / "checkpoints").glob("step-*"))
    for path in paths:
        parse((path / "manifest.json").read_text())
    manifest = checkpoint_manifest.read(paths[-1])
    assert math.isnan(manifest.metrics["error"])
    assert manifest.metrics["worst"] == math.inf
    assert math.isnan(manifest.progress["learning_rate"]["loss_sum"])
    show(config.directory, Console(file=io.StringIO()), as_json=True)
    assert parse(capsys.readouterr().out)[-1]["metrics"] == {"error": None, "worst": None}


def test_a_manifest_from_before_is_read(tmp_path: Path) -> None:
    files = {
        name: {"bytes": 0, "sha256": "0" * 64}
        for name in ("model.safetensors", "optimizer.safetensors", "compression.safetensors", "rank-00000.safetensors")
    }
    facts: dict[str, Any] = {"progress": {"x": math.inf}, "config": {"name": "NaN"}, "metrics": {"loss": math.nan}}
    old = Manifest(run="0" * 32, step=1, world_size=1, files=files, **facts).model_dump()  # type: ignore[arg-type]
    for name in files:
        (tmp_path / name).touch()
    content = json.dumps({"checksum": checkpoint_manifest._checksum(old), **old})
    assert "Infinity" in content
    (tmp_path / "manifest.json").write_text(content)
    found = checkpoint_manifest.read(tmp_path)
    assert found.progress == {"x": math.inf}
    assert math.isnan(found.metrics["loss"])
    (tmp_path / "manifest.json").write_bytes(found.dump())
    again = checkpoint_manifest.read(tmp_path)
    assert (again.progress, again.config) == (found.progress, {"name": "NaN"})
