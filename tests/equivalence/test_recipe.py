"""Each optimizer and schedule by name, on four ranks, is torch's on the joined batch: float64, 50 steps, to 1e-10."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torchs

from disttrain import DistributedOptimizer
from disttrain.comm import Communicator, simulate
from disttrain.optim.layers.groups import Layers
from disttrain.optim.optimizers.sections import optimizers
from disttrain.optim.schedules import schedules
from disttrain.optim.schedules.learning_rate import LearningRate
from tests.equivalence.test_one_process import batch, make_net, mean_loss, parameters_of
from tests.unit.optim.schedules.test_schedules import CASES, LR, STEPS_PER_EPOCH

NUM_STEPS, WORLD_SIZE, BATCH_SIZE = 50, 4, 24
Build = Callable[[list[nn.Parameter]], Optimizer]
Before = Callable[[list[nn.Parameter], float], None]  # what is done to parameters and gradients before a step


class Restated(Optimizer):
    """One function a parameter, as a paper writes it."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, update: Callable[..., torch.Tensor]) -> None:
        super().__init__(parameters, {"lr": lr})
        self._update = update

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.copy_(self._update(parameter, parameter.grad, self.state[parameter], group["lr"]))


def lars(w: torch.Tensor, g: torch.Tensor, state: dict[str, Any], lr: float) -> torch.Tensor:
    beta = 0.01 if w.dim() > 1 else 0.0
    local = 0.02 * w.norm() / (g.norm() + beta * w.norm()) if w.dim() > 1 else 1.0
    state["v"] = 0.9 * state.get("v", 0.0) + lr * local * (g + beta * w)
    return w - state["v"]


def lamb(x: torch.Tensor, g: torch.Tensor, state: dict[str, Any], lr: float) -> torch.Tensor:
    state["t"] = t = state.get("t", 0) + 1
    state["m"] = m = 0.9 * state.get("m", 0.0) + 0.1 * g
    state["v"] = v = 0.99 * state.get("v", 0.0) + 0.01 * g**2
    r = (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-3)
    if x.dim() <= 1:
        return x - lr * r
    r = r + 0.01 * x
    return x - lr * x.norm() / r.norm() * r


def nothing(parameters: list[nn.Parameter], lr: float) -> None:
    pass


def decay(parameters: list[nn.Parameter], lr: float) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.mul_(1 - lr * 0.1)


def sparsify(parameters: list[nn.Parameter], lr: float) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad += 0.01 * parameter.sign()


# Options, and plain torch (or a plain re-statement) with what it does before each step.
OPTIMIZERS: dict[str, tuple[dict[str, Any], Build, Before]] = {
    "sgd": ({"lr": 0.05, "weight_decay": 0.01}, lambda p: torch.optim.SGD(p, 0.05, weight_decay=0.01), nothing),
    "momentum": (
        {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
        nothing,
    ),
    "nesterov": (
        {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
        nothing,
    ),
    "adagrad": (
        {"lr": 0.05, "weight_decay": 0.01},
        lambda p: torch.optim.Adagrad(p, 0.05, weight_decay=0.01),
        nothing,
    ),
    "adadelta": (
        {"rho": 0.8, "weight_decay": 0.01},
        lambda p: torch.optim.Adadelta(p, 1.0, 0.8, weight_decay=0.01),
        nothing,
    ),
    "rmsprop": (
        {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "momentum": 0.5, "centered": True},
        lambda p: torch.optim.RMSprop(p, 0.01, 0.9, 1e-3, momentum=0.5, centered=True),
        nothing,
    ),
    "adam": (
        {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.01, "amsgrad": True},
        lambda p: torch.optim.Adam(p, 0.01, eps=1e-3, weight_decay=0.01, amsgrad=True),
        nothing,
    ),
    "adamw": (
        {"lr": 0.01, "betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, 0.01, (0.8, 0.9), 1e-3, weight_decay=0.1),
        nothing,
    ),
    "lars": ({"lr": 0.3, "trust_coefficient": 0.02, "weight_decay": 0.01}, lambda p: Restated(p, 0.3, lars), nothing),
    "lamb": (
        {"lr": 0.02, "betas": [0.9, 0.99], "eps": 1e-3, "weight_decay": 0.01},
        lambda p: Restated(p, 0.02, lamb),
        nothing,
    ),
    "sgd, decoupled": (
        {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "decoupled": True},
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
        decay,
    ),
    "adam, decoupled": (
        {"name": "adam", "lr": 0.01, "eps": 1e-3, "weight_decay": 0.1, "decoupled": True},
        lambda p: torch.optim.AdamW(p, 0.01, eps=1e-3, weight_decay=0.1),
        nothing,
    ),
    "rmsprop, l1": (
        {"name": "rmsprop", "lr": 0.01, "eps": 1e-2, "l1": 0.01},
        lambda p: torch.optim.RMSprop(p, 0.01, eps=1e-2),
        sparsify,
    ),
}


def one_process(build: Build, before: Before, schedule: Callable[[Optimizer], Any] | None) -> torch.Tensor:
    """Plain torch, nothing of ours."""
    net = make_net()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = build(parameters)
    scheduler = schedule(optimizer) if schedule else None
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = mean_loss(net, batch(step, BATCH_SIZE))
        loss.backward()
        with torch.no_grad():
            before(parameters, optimizer.param_groups[0]["lr"])
        optimizer.step()
        if isinstance(scheduler, torchs.ReduceLROnPlateau):
            scheduler.step(loss.item())
        elif scheduler is not None and step < NUM_STEPS - 1:
            scheduler.step()
    return parameters_of(net)


def one_of_many(
    optimizer_spec: Any, schedule_spec: Any, comm: Communicator, layers: Layers, compressor: Any = "dense", **more: Any
) -> torch.Tensor:
    net = make_net()
    layers.freeze(net)
    section = optimizers.build(optimizer_spec)
    inner = section.build(layers.groups(net, section.lr))
    optimizer = DistributedOptimizer(inner, net, comm=comm, bucket_mb=0.0005, compressor=compressor, **more)
    rate = LearningRate(optimizer, schedules.build(schedule_spec), NUM_STEPS, steps_per_epoch=STEPS_PER_EPOCH)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        samples = tuple(part.chunk(comm.world_size)[comm.rank] for part in batch(step, BATCH_SIZE))
        loss = mean_loss(net, samples)  # type: ignore[arg-type]
        loss.backward()
        optimizer.step()
        rate.observe({"loss": comm.all_reduce(loss.detach(), "mean").item()})
        rate.step()
    return parameters_of(net)


def assert_equal(wanted: torch.Tensor, optimizer: Any, schedule: Any, layers: Layers | None = None) -> None:
    results = simulate(WORLD_SIZE, lambda comm: one_of_many(optimizer, schedule, comm, layers or Layers()))
    for result in results:
        assert torch.equal(result, results[0]), "replicas are bit-identical"
    torch.testing.assert_close(results[0], wanted, rtol=0, atol=1e-10)
    assert (wanted - parameters_of(make_net())).abs().max() > 1e-3, "something was learned"


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_every_optimizer(case: str) -> None:
    options, build, before = OPTIMIZERS[case]
    assert_equal(one_process(build, before, None), {"name": case, **options}, "constant")


@pytest.mark.parametrize(
    ("case", "compressor"),
    [("lars", "topk"), ("lamb", "powersgd"), ("rmsprop, l1", "topk"), ("sgd, decoupled", "powersgd")],
)
def test_stepping_bucket_by_bucket_changes_no_bit(case: str, compressor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_by_bucket = DistributedOptimizer._can_step_by_bucket
    options = {"name": case, **OPTIMIZERS[case][0]}
    exchange = {"name": compressor, "min_numel": 1, **({"rank": 1} if compressor == "powersgd" else {})}
    seen = []

    def train(is_allowed: bool) -> list[torch.Tensor]:
        def decide(optimizer: DistributedOptimizer) -> bool:
            assert steps_by_bucket(optimizer)
            seen.append(is_allowed)
            return is_allowed

        monkeypatch.setattr(DistributedOptimizer, "_can_step_by_bucket", decide)
        return simulate(2, lambda comm: one_of_many(options, "constant", comm, Layers(), exchange, overlap_step=True))

    for alone, together in zip(train(True), train(False), strict=True):
        assert torch.equal(alone, together)
    assert set(seen) == {True, False}


SGD = {"name": "sgd", "lr": LR, "momentum": 0.5}


def sgd(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=0.5)


@pytest.mark.parametrize("case", CASES)
def test_every_schedule(case: str) -> None:
    options, theirs = CASES[case]
    assert_equal(one_process(sgd, nothing, lambda o: theirs(o, NUM_STEPS)), SGD, {"name": case, **options})


def test_reduce_on_plateau() -> None:
    seen = []

    def theirs(optimizer: Optimizer) -> Any:
        seen.append(optimizer)
        return torchs.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)

    wanted = one_process(sgd, nothing, theirs)
    assert 0 < seen[0].param_groups[0]["lr"] < LR
    assert_equal(wanted, SGD, {"name": "reduce_on_plateau", "gamma": 0.5, "patience": 2})


def test_rates_layer_by_layer() -> None:
    def theirs(parameters: list[nn.Parameter]) -> Optimizer:
        names = {parameter: name for name, parameter in make_net().named_parameters()}
        of = dict(zip([name for p, name in names.items() if p.requires_grad], parameters, strict=True))
        of["conv.weight"].requires_grad_(False)
        # From input to head: the scale, the convolution, the embedding (which is the head too) with its norm, ...
        depth = {"scale": 0, "conv.bias": 1, "embedding.weight": 2, "norm.weight": 2, "norm.bias": 2}
        depth |= {"never_used.weight": 3, "never_used.bias": 3}
        groups = [
            {"params": [of[name]], "lr": LR * 0.7 ** (4 - where) * (3 if name.startswith("norm") else 1)}
            for name, where in depth.items()
        ]
        groups[3]["weight_decay"] = groups[4]["weight_decay"] = 0.05
        return torch.optim.SGD(groups, lr=LR, momentum=0.5)

    rules = [{"match": "norm.*", "lr_factor": 3.0, "weight_decay": 0.05}, {"match": "conv.weight", "freeze": True}]
    wanted = one_process(theirs, nothing, lambda o: torchs.ExponentialLR(o, 0.97))
    layers = Layers.model_validate({"decay": 0.7, "rules": rules})
    assert_equal(wanted, SGD, {"name": "exponential", "gamma": 0.97}, layers)


@pytest.mark.parametrize("jump", [0.1, 5.0])
def test_the_momentum_of_sgd_needs_no_correction(jump: float) -> None:
    """It is that of Goyal et al. 2017, equation 10 with remark 3, when the rate jumps."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
    inner = optimizers.build({"name": "sgd", "lr": 0.1, "momentum": 0.9}).build([parameter])
    rate = LearningRate(inner, schedules.build({"name": "step", "step_size": 5, "gamma": jump}), 10)
    w, v, before = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0.1
    for step in range(10):
        parameter.grad = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) * (step + 1)
        now = 0.1 if step < 5 else 0.1 * jump
        v = 0.9 * (now / before) * v + now * parameter.grad
        w, before = w - v, now
        inner.step()
        rate.step()
    torch.testing.assert_close(parameter.detach(), w, rtol=0, atol=1e-12)
