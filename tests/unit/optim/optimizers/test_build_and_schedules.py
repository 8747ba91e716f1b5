from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disttrain.errors import UserError
from disttrain.optim.optimizers.sections import optimizers
from disttrain.optim.schedules import Constant, Cosine, schedules


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([1.0, -2.0]))


@pytest.mark.parametrize(
    ("spec", "reference"),
    [
        (
            {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        ),
        (
            {"name": "adamw", "lr": 0.1, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.01},
            lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.01),
        ),
    ],
)
def test_an_optimizer_by_name_is_torchs(spec: dict[str, Any], reference: Any) -> None:
    ours, theirs = parameter(), parameter()
    pairs = [(ours, optimizers.build(spec).build([ours])), (theirs, reference([theirs]))]
    for step in range(4):
        for value, optimizer in pairs:
            value.grad = torch.tensor([0.3, -0.1]) * (step + 1)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "sgd"}, "missing key 'optimizer.lr'"),
        ({"name": "sgd", "lr": 0}, "optimizer.lr=0 should be greater than 0"),
        ({"name": "sgd", "lr": 1, "momentum": 1}, "optimizer.momentum=1 should be less than 1"),
        ({"name": "sgd", "lr": 1, "nesterov": True}, "needs momentum"),
        ({"name": "adamw", "lr": 1, "betas": [0.9, 1.5]}, r"optimizer.betas=\[0.9, 1.5\] must both be"),
        ({"name": "adamw", "lr": 1, "momentum": 0.9}, "unknown key 'optimizer.momentum'"),
        (
            {"lr": 1},
            "missing key 'optimizer.name': choose from adadelta, adagrad, adam, adamw, lamb,",
        ),
        (3, "optimizer=3 should be a name or a section"),
    ],
)
def test_a_wrong_optimizer_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        optimizers.build(spec)


def rates(spec: Any, num_steps: int, start: int = 0) -> list[float]:
    optimizer = torch.optim.SGD([parameter()], lr=0.5)
    scheduler = schedules.build(spec).build(optimizer, num_steps, start)
    seen = []
    for _ in range(start, num_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_a_constant_rate_after_warmup() -> None:
    assert rates({"name": "constant", "warmup_steps": 4}, 6) == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert rates("constant", 3) == [0.5] * 3


def test_the_cosine_is_torchs_after_warmup() -> None:
    seen = rates({"name": "cosine", "warmup_steps": 3, "final_lr_factor": 0.1}, 13)
    optimizer = torch.optim.SGD([parameter()], lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.05)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen[3:] == pytest.approx(expected)
    assert seen[:3] == pytest.approx([0.5 / 3, 1 / 3, 0.5])


@given(st.integers(0, 20), st.integers(1, 60), st.floats(0, 1), st.integers(0, 100))
def test_factors_stay_within_their_bounds(warmup: int, more: int, final: float, step: int) -> None:
    for schedule in (Constant(warmup_steps=warmup), Cosine(warmup_steps=warmup, final_lr_factor=final)):
        assert 0 <= schedule.factor(step, warmup + more) <= 1
    cosine = Cosine(warmup_steps=warmup, final_lr_factor=final)
    assert math.isclose(cosine.factor(warmup, warmup + more), 1.0)
    assert math.isclose(cosine.factor(warmup + more, warmup + more), final, abs_tol=1e-12)


@pytest.mark.parametrize("start", [1, 2, 5])
def test_starting_at_a_step_gives_the_same_rates_bit_for_bit(start: int) -> None:
    spec = {"name": "cosine", "warmup_steps": 3}
    assert rates(spec, 9, start) == rates(spec, 9)[start:]


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"schedule.warmup_steps=5 must be less than the run's 5 steps"):
        rates({"name": "constant", "warmup_steps": 5}, 5)
