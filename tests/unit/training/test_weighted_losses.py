"""Tasks whose loss is no mean over samples: it comes with its weight, and any number of ranks and passes is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.comm import SingleProcess, simulate
from tests.support.runs import make_config, records, train
from tests.support.tiny_task import Tiny


class Weighted(Tiny):
    """A mean over class weights, which depend on the sample."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        weights = 1.0 + 9.0 * (batch[0][:, 0] > 0)
        errors = (model(batch[0]) - batch[1]).square().sum(1)
        return (weights * errors).sum() / weights.sum(), weights.sum()


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 3), (2, 1), (3, 2), (4, 3)])
def test_any_ranks_and_passes_equal_one(tmp_path: Path, world_size: int, accumulation: int) -> None:
    """50 samples in batches of 24 leave 2 for the last step: then some ranks have no pass, or no last one."""
    task = {"name": "tests.unit.training.test_weighted_losses:Weighted"}
    one = make_config(tmp_path / "one", task=task)
    many = make_config(tmp_path / "many", task=task, accumulation=accumulation)
    _, expected = train(one, SingleProcess())
    for _, weights in simulate(world_size, lambda comm: train(many, comm)):
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-10)
    for ours, theirs in zip(records(many), records(one), strict=True):
        if "loss" in theirs:
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-10)
