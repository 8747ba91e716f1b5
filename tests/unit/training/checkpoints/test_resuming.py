"""Resuming with every compressor: bit for bit on the same number of ranks, preserving residuals on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from disttrain import compression
from disttrain.comm import Communicator, simulate
from disttrain.errors import UserError
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.training.checkpoints import contents as checkpoint
from disttrain.training.checkpoints import folder as checkpoint_folder
from disttrain.training.config import Config
from tests.support import checkpoints
from tests.support.runs import make_config, records, stop_run, train, untimed_records
from tests.support.workers import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

# Options that make state of every kind: residuals where they are off by default, servers' residuals, both factors.
OPTIONS: dict[str, dict[str, Any]] = {
    "dgc": {"ratio": 0.1, "warmup_steps": 3},
    "threshold": {"ratio": 0.2},
    "topk": {"ratio": 0.1, "exchange": "two_stage"},
    "powersgd": {"rank": 2, "alternating": True, "rank_ramp": {"start": 1, "steps": 5}, "min_compression": 1},
    "fp16": {"error_feedback": True},
    "bf16": {"error_feedback": True},
    "natural": {"error_feedback": True, "exchange": "two_stage"},
    "qsgd": {"error_feedback": True, "exchange": "two_stage"},
    "terngrad": {"error_feedback": True},
    "efsign": {"exchange": "two_stage", "mean_bits": 2},
    "blockwise4": {"exchange": "two_stage"},
}


def spec_of(name: str) -> dict[str, Any]:
    base = {} if name == "dense" else {"min_numel": 1}
    return {"name": name, **base, **OPTIONS.get(name, {})}


@pytest.mark.parametrize("name", compression.names())
def test_every_compressor_resumes_to_the_bit(tmp_path: Path, name: str) -> None:
    """Within an epoch, while the batch grows, with accumulation, and an overflow in float16 just before."""
    changes: dict[str, Any] = {
        "compressor": spec_of(name),
        "dtype": "float32",
        "precision": "fp16",
        "loss_scale": {"initial": 2.0**26, "growth_interval": 3},
        "batch_size": 4,
        "accumulation": 2,
        "batch": {"name": "schedule", "milestones": [0.2, 0.5], "max_batch_size": 20, "lr_scaling": "sqrt"},
        "average": {"decay": 0.6},
        "early_stopping": {"metric": "error", "mode": "min", "patience": 99, "restore_best": True},
        "max_steps": 9,
    }
    never = {"every_epochs": None}
    reference = make_config(tmp_path / "reference", **changes, checkpoint=never)
    expected = simulate(2, lambda comm: train(reference, comm))
    config = make_config(tmp_path / "stopped", **changes, checkpoint={"every_steps": 4, "in_flight": 2}, resume="auto")
    stop_run(config, 2, 4)
    resumed = simulate(2, lambda comm: train(config, comm))
    for (summary, model), (expected_summary, expected_model) in zip(resumed, expected, strict=True):
        assert all(torch.equal(model[key], value) for key, value in expected_model.items())
        assert summary["wire"] == expected_summary["wire"]
        assert summary["skipped_steps"] == expected_summary["skipped_steps"] > 0
    assert untimed_records(config) == untimed_records(reference)
    sizes = [record["batch_size"] for record in records(config) if record["kind"] == "train"]
    assert len(set(sizes[:4])) > 1, "the batch has grown before the stop"
    assert len(set(sizes[4:])) > 1, "and after it"


@pytest.mark.parametrize("name", ["topk", "powersgd", "dgc"])
def test_a_run_that_flushes_resumes_to_the_bit(tmp_path: Path, name: str) -> None:
    """One file holds the residuals, and resuming from it equals continuing."""
    changes: dict[str, Any] = {
        "compressor": spec_of(name),
        "max_steps": 8,
        "checkpoint": {"every_epochs": None, "every_steps": 4, "residuals": "flush"},
    }
    reference = make_config(tmp_path / "reference", **changes)
    expected = simulate(3, lambda comm: train(reference, comm))
    config = make_config(tmp_path / "stopped", **changes, resume="auto")
    stop_run(config, 3, 6)
    folder = config.directory / "checkpoints/step-00000004"
    for rank in range(3):
        assert {key.partition(":")[0] for key in load_file(folder / f"rank-{rank:05d}.safetensors")} == {"rng"}
    for (_, model), (_, expected_model) in zip(simulate(3, lambda comm: train(config, comm)), expected, strict=True):
        assert all(torch.equal(model[key], value) for key, value in expected_model.items())
    kept = make_config(tmp_path / "kept", **{**changes, "checkpoint": {"every_epochs": None, "every_steps": 4}})
    others = simulate(3, lambda comm: train(kept, comm))
    assert not all(torch.equal(others[0][1][key], value) for key, value in expected[0][1].items()), "it has flushed"


def pending(ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of each tensor over the ranks that hold it, with servers' residuals added to the parameter's."""
    found = {}
    for name in ranks[0]:
        parts = [rank[name].double() for rank in ranks if rank[name].numel()]
        if name.endswith("/server_residual"):
            found[name] = torch.cat(parts)
        elif parts:
            found[name] = torch.stack(parts).mean(0)
    for name in [name for name in found if name.endswith("/server_residual")]:
        found[name.replace("server_", "")] += found.pop(name)
    return found


def make(comm: Communicator, spec: dict[str, Any], num_steps: int) -> tuple[torch.nn.Module, DistributedOptimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(20, 12), torch.nn.Tanh(), torch.nn.Linear(12, 7)).double()
    inner = torch.optim.AdamW if "whiten" in spec else torch.optim.SGD
    optimizer = DistributedOptimizer(
        inner(model.parameters(), lr=0.05), model, comm=comm, compressor=spec, bucket_mb=0.001
    )
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(10 * step + comm.rank)
        optimizer.zero_grad()
        model(torch.randn(4, 20, generator=generator, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    return model, optimizer


HAVE_STATE = [name for name in compression.names() if name != "dense"]


@pytest.mark.parametrize("way", ["", "flushed", "whitened"])
@pytest.mark.parametrize("layout", ["flat", "nodes"])
@pytest.mark.parametrize("name", HAVE_STATE)
def test_other_numbers_of_ranks_keep_what_every_compressor_has_pending(
    tmp_path: Path, name: str, layout: str, way: str
) -> None:
    spec = {**spec_of(name), "hierarchical": layout == "nodes"}
    if way == "whitened":
        spec["whiten"] = {"warmup_steps": 1, "refresh_growth": 1.0, "band": 1e9}

    def save(comm: Communicator) -> dict[str, torch.Tensor]:
        model, optimizer = make(comm, spec, 6 if way == "whitened" else 3)
        own: dict[str, torch.Tensor] = optimizer.state_dict()["compression"]["per_rank"]
        checkpoints.save(comm, tmp_path, model, optimizer, 3, flush=way == "flushed")
        return own

    def load(comm: Communicator) -> dict[str, torch.Tensor]:
        model, optimizer = make(comm, spec, 0)
        checkpoint.load(*checkpoint_folder.find(tmp_path), comm, model, optimizer)
        return optimizer.state_dict()["compression"]["per_rank"]

    before = pending(simulate(4, save, local_size=2))
    residuals = [value for key, value in before.items() if key.endswith(("/residual", "/velocity"))]
    assert all(value.abs().sum() > 0 for value in residuals)
    for world_size, local_size in ((2, 1), (6, 2), (4, 2)):
        after = pending(simulate(world_size, load, local_size=local_size))
        assert {key for key in before if not key.endswith(("/q", "/p"))} <= after.keys()
        for key in after:
            torch.testing.assert_close(after[key], before[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("whiten", [False, {"warmup_steps": 1, "refresh_growth": 1.0, "band": 1e9}])
def test_one_node_has_no_residuals(tmp_path: Path, whiten: Any) -> None:
    """A hierarchical exchange to and from a single node, which is dense."""
    spec = {**spec_of("powersgd"), **({"whiten": whiten} if whiten else {})}

    def run(comm: Communicator, hierarchical: bool, step: int | None) -> dict[str, torch.Tensor]:
        model, optimizer = make(comm, {**spec, "hierarchical": hierarchical}, 6 if step else 0)
        if step:
            checkpoints.save(comm, tmp_path, model, optimizer, step)
        else:
            checkpoint.load(*checkpoint_folder.find(tmp_path), comm, model, optimizer)
        return optimizer.state_dict()["compression"]["per_rank"]

    alone = simulate(2, lambda comm: run(comm, True, 1))
    assert not any(key for of_rank in alone for key in of_rank if not key.endswith("/whitening_reference"))
    fresh = pending(simulate(4, lambda comm: run(comm, True, None), local_size=2))
    assert not any(value.any() for key, value in fresh.items() if key.endswith("/residual"))
    before = pending(simulate(4, lambda comm: run(comm, True, 2), local_size=2))
    with pytest.raises(UserError, match=r"resume on more nodes, or with compressor\.hierarchical=false"):
        simulate(2, lambda comm: run(comm, True, None))
    after = pending(simulate(2, lambda comm: run(comm, False, None)))
    for key, value in after.items():
        torch.testing.assert_close(value, before[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compressor", ["topk", "powersgd"])
def test_text_on_4_2_3_and_8_ranks_trains_as_if_on_4(
    tmp_path: Path, compressor: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Batches do not depend on the ranks, and the mean residual is preserved: the loss stays within noise."""
    caplog.set_level("INFO", "disttrain")
    options = {"topk": {"ratio": 0.05, "exchange": "two_stage"}, "powersgd": {"rank": 2}}[compressor]
    changes: dict[str, Any] = {
        "task": {
            "name": "text",
            "path": f"{ROOT}/disttrain/*/*.py",
            "context": 32,
            "width": 32,
            "layers": 1,
            "heads": 2,
        },
        "compressor": {"name": compressor, **options},
        "dtype": "float32",
        "batch_size": 24,
        "epochs": None,
        "optimizer": {"name": "adam", "lr": 3e-3},
        "evaluation": {"every_epochs": None},
        "checkpoint": {"every_epochs": None, "every_steps": 1000},
    }
    whole = make_config(tmp_path / "whole", **changes, max_steps=48)
    simulate(4, lambda comm: train(whole, comm))
    for stop, world_size in zip((12, 24, 36, 48), (4, 2, 3, 8), strict=True):
        config = make_config(tmp_path / "parts", **changes, max_steps=stop, resume="auto")
        simulate(world_size, lambda comm, config=config: train(config, comm))
    assert "8 workers instead of 3: a batch of 24 is now 3 samples per worker, was 8" in caplog.text
    curves = [
        torch.tensor([record["loss"] for record in records(config) if record["kind"] == "train"])
        for config in (whole, config)
    ]
    assert len(curves[0]) == len(curves[1]) == 48
    first, last = curves[0][:6].mean(), curves[0][-6:].mean()
    assert last < 0.9 * first, "it learns"
    assert (curves[0] - curves[1]).abs().max() < 0.1 * (first - last)


def test_saving_and_resuming_change_no_bit_of_what_each_rank_has_of_its_own(tmp_path: Path) -> None:
    """BatchNorm statistics and their average after each step: without saving, with saving, and resumed."""

    def config(folder: str, every_steps: int | None, **more: Any) -> Config:
        return make_config(
            tmp_path / folder,
            task={"batch_norm": True, "num_samples": 52},
            drop_last=True,
            average={"decay": 0.9},
            evaluation={"every_epochs": None},
            max_steps=7,
            checkpoint={"every_epochs": None, "every_steps": every_steps},
            **more,
        )

    def buffers(comm: Communicator, config: Config) -> list[dict[str, torch.Tensor]]:
        seen: list[dict[str, torch.Tensor]] = []
        train(config, comm, lambda trainer: seen.append({k: v.clone() for k, v in trainer.buffers.live().items()}))
        return seen

    never = simulate(3, lambda comm: buffers(comm, config("never", None)))
    always = simulate(3, lambda comm: buffers(comm, config("always", 1)))
    stop_run(config("stopped", 4), 3, 4)
    resumed = simulate(3, lambda comm: buffers(comm, config("stopped", 4, resume="auto")))
    assert any(not value.equal(never[1][5][name]) for name, value in never[0][5].items()), "ranks differ"
    for rank in range(3):
        for found in (always[rank], resumed[rank]):
            for before, after in zip(reversed(never[rank]), reversed(found), strict=False):
                assert all(value.equal(after[name]) for name, value in before.items())
    assert len(resumed[0]) == 2
