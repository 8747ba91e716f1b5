"""Every schedule equals torch's scheduler of the same name to 1e-12: alone, after a warmup, and in a sequence."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torchs

from disttrain.errors import UserError
from disttrain.optim.schedules import schedules
from disttrain.optim.schedules.learning_rate import LearningRate

NUM_STEPS, STEPS_PER_EPOCH, LR = 50, 5, 0.4
Theirs = Callable[[Optimizer, int], torchs.LRScheduler]  # from the optimizer and the length in steps or epochs

# By name: options, and torch's scheduler for a run of that many steps or epochs.
CASES: dict[str, tuple[dict[str, Any], Theirs]] = {
    "constant": ({}, lambda o, n: torchs.ConstantLR(o, factor=1.0)),
    "step": ({"step_size": 4, "gamma": 0.5}, lambda o, n: torchs.StepLR(o, 4, 0.5)),
    "multi_step": ({"milestones": [3, 6, 7], "gamma": 0.3}, lambda o, n: torchs.MultiStepLR(o, [3, 6, 7], 0.3)),
    "exponential": ({"gamma": 0.93}, lambda o, n: torchs.ExponentialLR(o, 0.93)),
    "inverse_time": ({"rate": 0.1}, lambda o, n: torchs.LambdaLR(o, lambda t: 1 / (1 + 0.1 * t))),
    "cosine": ({"final_lr_factor": 0.05}, lambda o, n: torchs.CosineAnnealingLR(o, n, eta_min=0.05 * LR)),
    "linear": ({"final_lr_factor": 0.1}, lambda o, n: torchs.LinearLR(o, 1.0, 0.1, n)),
    "polynomial": ({"power": 3.0}, lambda o, n: torchs.PolynomialLR(o, n, 3.0)),
    "one_cycle": ({}, lambda o, n: torchs.OneCycleLR(o, LR, n, cycle_momentum=False)),
    "one_cycle, linear": (
        {"name": "one_cycle", "peak_at": 0.6, "start_factor": 0.1, "final_lr_factor": 0.001, "anneal": "linear"},
        lambda o, n: torchs.OneCycleLR(
            o,
            LR,
            n,
            pct_start=0.6,
            anneal_strategy="linear",
            cycle_momentum=False,
            div_factor=10,
            final_div_factor=100,
        ),
    ),
}


def make_optimizer(lr: float = LR) -> Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=lr)


def rates(spec: Any, num_steps: int = NUM_STEPS, start: int = 0) -> list[float]:
    optimizer = make_optimizer()
    rate = LearningRate(optimizer, schedules.build(spec), num_steps, steps_per_epoch=STEPS_PER_EPOCH, step=start)
    seen = []
    for _ in range(start, num_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        assert rate.lr == seen[-1]
        rate.step()
    return seen


def torchs_rates(build: Callable[[Optimizer], Any], count: int) -> list[float]:
    optimizer = make_optimizer()
    scheduler, seen = build(optimizer), []
    for index in range(count):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if index < count - 1:  # OneCycleLR raises an error after its last step
            scheduler.step()
    return seen


def close(expected: list[float]) -> Any:
    return pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_by_step_it_is_torchs(case: str) -> None:
    options, theirs = CASES[case]
    expected = torchs_rates(lambda o: theirs(o, NUM_STEPS), NUM_STEPS)
    assert rates({"name": case, **options}) == close(expected)
    assert case == "constant" or len(set(expected)) > 1


@pytest.mark.parametrize("case", CASES)
def test_by_epoch_it_is_torchs_stepped_once_an_epoch(case: str) -> None:
    options, theirs = CASES[case]
    num_epochs = NUM_STEPS // STEPS_PER_EPOCH
    expected = torchs_rates(lambda o: theirs(o, num_epochs), num_epochs)
    by_epoch = [rate for rate in expected for _ in range(STEPS_PER_EPOCH)]
    assert rates({"name": case, "by": "epoch", **options}) == close(by_epoch)


@pytest.mark.parametrize("start", [0.0, 0.25])
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("one_cycle")])
def test_a_linear_warmup_is_torchs(case: str, start: float) -> None:
    options, theirs = CASES[case]
    warmup = 3  # torch's includes both ends: it starts at our first factor and is one step shorter
    first = start + (1 - start) / warmup

    def build(optimizer: Optimizer) -> Any:
        rise = torchs.LinearLR(optimizer, first, 1.0, warmup - 1)
        return torchs.SequentialLR(optimizer, [rise, theirs(optimizer, NUM_STEPS - warmup)], [warmup])

    spec = {"name": case, "warmup_steps": warmup, "warmup_start_factor": start, **options}
    expected = torchs_rates(build, NUM_STEPS)
    if case in ("step", "multi_step"):  # these count from the start of the run
        expected[warmup:] = torchs_rates(lambda o: theirs(o, NUM_STEPS), NUM_STEPS)[warmup:]
    assert rates(spec) == close(expected)


def test_an_exponential_warmup_multiplies_by_a_constant_each_step() -> None:
    seen = rates({"name": "constant", "warmup_epochs": 2, "warmup": "exponential", "warmup_start_factor": 0.001})
    assert seen[9:] == [LR] * 41
    quotients = [after / before for before, after in itertools.pairwise(seen[:10])]
    assert quotients == pytest.approx([1000 ** (1 / 10)] * 9)
    assert seen[0] == pytest.approx(LR * 0.001 * quotients[0])


def test_a_warmup_in_epochs_precedes_a_schedule_by_epoch() -> None:
    seen = rates({"name": "cosine", "by": "epoch", "warmup_epochs": 2})
    expected = torchs_rates(lambda o: torchs.CosineAnnealingLR(o, 8), 8)
    assert seen[:10] == pytest.approx([LR * (step + 1) / 10 for step in range(10)])
    assert seen[10:] == close([rate for rate in expected for _ in range(STEPS_PER_EPOCH)])


def test_a_sequence_is_torchs() -> None:
    parts = [
        {"name": "linear", "steps": 10, "final_lr_factor": 0.5},
        {"name": "exponential", "epochs": 3, "gamma": 0.9},
        {"name": "cosine"},
    ]

    def build(optimizer: Optimizer) -> Any:
        chain = [
            torchs.LinearLR(optimizer, 1.0, 0.5, 10),
            torchs.ExponentialLR(optimizer, 0.9),
            torchs.CosineAnnealingLR(optimizer, 25),
        ]
        return torchs.SequentialLR(optimizer, chain, [10, 25])

    expected = torchs_rates(build, NUM_STEPS)
    for index in range(25, NUM_STEPS):  # in closed form: torch's recursion differs if it starts in the middle of a run
        expected[index] = LR * 0.5 * (1 + math.cos(math.pi * (index - 25) / 25))
    assert rates({"name": "sequence", "parts": parts}) == close(expected)


def test_parts_of_a_sequence_have_warmups_and_factors() -> None:
    parts = [{"name": "constant", "steps": 4, "warmup_steps": 2}, {"name": "linear", "lr_factor": 0.5}]
    assert rates({"name": "sequence", "parts": parts}, 8) == close(
        [LR * factor for factor in (0.5, 1, 1, 1, 0.5, 0.375, 0.25, 0.125)]
    )


SPECS = [
    *({"name": case, **options} for case, (options, _) in CASES.items()),
    {"name": "sequence", "parts": [{"name": "linear", "steps": 7, "warmup_steps": 2}, {"name": "one_cycle"}]},
    {"name": "reduce_on_plateau", "warmup_steps": 3},
]


@given(st.sampled_from(SPECS), st.integers(1, NUM_STEPS - 1))
def test_starting_at_a_step_gives_the_same_rates_bit_for_bit(spec: dict[str, Any], start: int) -> None:
    assert rates(spec, start=start) == rates(spec)[start:]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["name"])
def test_what_is_dumped_builds_the_same(spec: dict[str, Any]) -> None:
    schedule = schedules.build(spec)
    assert schedules.build(json.loads(json.dumps(schedules.dump(schedule)))) == schedule


LOSSES = [5, 4, 3, 3, 3, 2.9999, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"patience": 2}, {"patience": 2}),
        ({"patience": 1, "gamma": 0.5, "cooldown": 2}, {"patience": 1, "factor": 0.5, "cooldown": 2}),
        ({"patience": 0, "mode": "max"}, {"patience": 0, "mode": "max"}),
        ({"patience": 0, "min_factor": 0.05}, {"patience": 0, "min_lr": 0.05 * LR}),
        (
            {"patience": 1, "threshold": 0.1, "threshold_mode": "abs"},
            {"patience": 1, "threshold": 0.1, "threshold_mode": "abs"},
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("stop_at", [None, 0, 3, 9, 15])
def test_reduce_on_plateau_is_torchs_with_and_without_resuming(
    ours: dict[str, Any], theirs: dict[str, Any], stop_at: int | None
) -> None:
    reference = make_optimizer()
    scheduler = torchs.ReduceLROnPlateau(reference, eps=0, **theirs)
    schedule = schedules.build({"name": "reduce_on_plateau", **ours})
    optimizer = make_optimizer()
    rate = LearningRate(optimizer, schedule, 100)
    for step, loss in enumerate(LOSSES):
        if step == stop_at:
            state = json.loads(json.dumps(rate.state_dict()))
            optimizer = make_optimizer()
            rate = LearningRate(optimizer, schedule, 100, step=step)
            rate.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(reference.param_groups[0]["lr"], rel=1e-12)
        scheduler.step(loss)
        rate.observe({"other": 0.0, "loss": loss})
        rate.step()
    assert optimizer.param_groups[0]["lr"] < LR


def test_scale_gain_and_the_rates_of_groups_multiply() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": torch.tensor(0.3)}]
    optimizer = torch.optim.SGD(groups, lr=0.2, foreach=False)
    held = optimizer.param_groups[1]["lr"]
    rate = LearningRate(optimizer, schedules.build({"name": "linear"}), 4, scale=2.0)
    rate.set(1, gain=3.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 2 * 0.75 * 3)
    assert held.item() == pytest.approx(0.3 * 2 * 0.75 * 3), "the tensor is changed in place"
    assert rate.lr == pytest.approx(0.2 * 2 * 0.75 * 3)


def test_epochs_of_unknown_length_are_refused() -> None:
    for spec in ({"name": "cosine", "by": "epoch"}, {"name": "constant", "warmup_epochs": 1}):
        with pytest.raises(UserError, match="counts epochs: pass steps_per_epoch, or set"):
            LearningRate(make_optimizer(), schedules.build(spec), 10)
