"""The loss scale: exact, gone before anything is compressed, with no trace of an overflow but in itself."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer, LossScale, compression
from disttrain.comm import Communicator, SingleProcess, simulate
from disttrain.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

with torch.random.fork_rng():
    torch.manual_seed(0)
    MODEL = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 2))

every_compressor = pytest.mark.parametrize("name", compression.names())


def inputs(rank: int, step: int, part: int = 0) -> torch.Tensor:
    return torch.randn(10, 6, generator=torch.Generator().manual_seed(1000 * step + 10 * rank + part))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x).float() - torch.stack([x.sum(1).sin(), x[:, 0]], 1)).square().mean()


class Run:
    """One rank, training with a momentum, clipping and two backward passes a step."""

    def __init__(self, comm: Communicator, name: str, loss_scale: LossScale | None, **options: Any) -> None:
        self.model = copy.deepcopy(MODEL)
        lr = 0.002 if name == "signsgd" else 0.05  # its gradients are all of size 1
        momentum = 0.0 if name == "dgc" else 0.9  # it has one of its own
        inner = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=momentum)
        self.rank = comm.rank
        self.losses: list[float] = []
        self.optimizer = DistributedOptimizer(
            inner,
            self.model,
            comm=comm,
            compressor={"name": name, "min_numel": 0},
            loss_scale=loss_scale,
            **{"clip_norm": 0.5, **options},
        )

    def step(self, step: int, *, half: bool = False, factor: float = 1.0) -> None:
        self.optimizer.zero_grad()
        for part in range(2):
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = loss_of(self.model, inputs(self.rank, step, part))
            if part == 0:
                with self.optimizer.no_sync():
                    self.optimizer.scale(loss / 2).backward()
            else:
                self.optimizer.scale(loss / 2 * factor).backward()
        self.losses.append(loss.item())
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """All that a step may change, flat; without the scale."""
        saved = self.optimizer.state_dict()
        found = {name: value.clone() for name, value in self.model.state_dict().items()}
        for kind in ("replicated", "per_rank"):
            found |= {f"{kind}:{name}": value for name, value in saved["compression"][kind].items()}
        found["committed"] = saved["compression"]["step"]
        for index, entry in saved["state"].items():
            found |= {f"{index}/{name}": torch.as_tensor(value) for name, value in entry.items() if value is not None}
        return found


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name])), name


@every_compressor
def test_the_scale_changes_no_bit(name: str) -> None:
    """With accumulation, clipping and momentum: weights, the norm, residuals and factors are in true units."""

    def train(comm: Communicator, loss_scale: LossScale | None) -> tuple[dict[str, Any], float]:
        run = Run(comm, name, loss_scale)
        for step in range(5):
            run.step(step)
        assert run.optimizer.grad_norm is not None
        return run.state(), run.optimizer.grad_norm.item()

    plain = simulate(2, lambda comm: train(comm, None))
    scaled = simulate(2, lambda comm: train(comm, LossScale(2.0**12, growth_interval=2)))
    for (state, norm), (expected, expected_norm) in zip(scaled, plain, strict=True):
        assert_same(state, expected)
        assert norm == expected_norm


@every_compressor
@pytest.mark.parametrize("seed", [0, 1])
def test_steps_that_overflow_on_one_rank_leave_no_trace_in_float16(name: str, seed: int) -> None:
    draw = random.Random(f"{name} {seed}")
    spoilt = {step: draw.randrange(2) for step in draw.sample(range(10), 3)}  # whose gradient overflows

    def train(comm: Communicator, *, clean: bool) -> tuple[dict[str, Any], LossScale]:
        loss_scale = LossScale(2.0**10, growth_interval=3)
        run = Run(comm, name, loss_scale)
        for step in range(10):
            if step not in spoilt:
                run.step(step, half=True)
            elif clean:  # the step never was; the scale alone goes the same way, as half precision rounds by it
                loss_scale.update(False)
                run.optimizer.load_state_dict(run.optimizer.state_dict())  # takes the new scale
            else:
                run.step(step, half=True, factor=1e38 if spoilt[step] == comm.rank else 1.0)
        assert run.optimizer.skipped_steps == (0 if clean else len(spoilt))
        return run.state(), loss_scale

    troubled = simulate(2, lambda comm: train(comm, clean=False))
    untroubled = simulate(2, lambda comm: train(comm, clean=True))
    for (state, loss_scale), (expected, expected_scale) in zip(troubled, untroubled, strict=True):
        assert_same(state, expected)
        assert loss_scale.state_dict() == expected_scale.state_dict() == troubled[0][1].state_dict()


@every_compressor
def test_a_scale_that_is_too_high_falls_and_training_continues(name: str) -> None:
    def train(comm: Communicator) -> Run:
        run = Run(comm, name, LossScale(2.0**30), clip_norm=None)
        for step in range(45):
            run.step(step % 5, half=True)
        return run

    for run in simulate(2, train):
        loss_scale = run.optimizer.loss_scale
        assert loss_scale is not None
        assert 5 <= run.optimizer.skipped_steps <= 25
        assert loss_scale.value == 2.0 ** (30 - run.optimizer.skipped_steps)
        assert all(torch.as_tensor(value).isfinite().all() for value in run.state().values())
        assert sum(run.losses[-5:]) < 0.9 * sum(run.losses[:5])


def test_gradients_that_float16_cannot_hold_arrive_thanks_to_the_scale() -> None:
    def gradient(loss_scale: LossScale | None) -> torch.Tensor:
        model = nn.Linear(6, 2, bias=False)
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0), model, comm=SingleProcess(), loss_scale=loss_scale
        )
        with torch.autocast("cpu", torch.float16):
            loss = model(torch.ones(3, 6)).float().sum() * 1e-9
        optimizer.scale(loss).backward()
        assert optimizer.synchronize()
        assert model.weight.grad is not None
        return model.weight.grad

    assert not gradient(None).any()
    torch.testing.assert_close(gradient(LossScale()), torch.full((2, 6), 3e-9), rtol=1e-3, atol=0)


def test_the_scale_grows_after_finite_steps_and_falls_to_its_minimum() -> None:
    scale = LossScale(8.0, growth_interval=2, growth_factor=4.0, backoff_factor=0.25, minimum=2.0)
    values = []
    for is_finite in (True, True, True, False, True, False, False, True, True):
        scale.update(is_finite)
        values.append(scale.value)
    assert values == [8, 32, 32, 8, 8, 2, 2, 2, 8]
    assert scale.scale(torch.tensor(60000.0, dtype=torch.float16)).item() == 480000
    huge = LossScale(2.0**126, growth_interval=1)
    for _ in range(5):
        huge.update(True)
    assert huge.value == 2.0**127, "float32 holds no more"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": 1000.0}, "loss_scale.initial=1000.0 must be a power of two"),
        ({"initial": 0.0}, "power of two"),
        ({"growth_factor": 0.5}, "growth_factor=0.5 must be 1 or more"),
        ({"backoff_factor": 2.0}, "backoff_factor=2.0 must be 1 or less"),
        ({"growth_interval": 0}, "growth_interval=0 must be 1 or more"),
        ({"initial": 2.0, "minimum": 4.0}, "minimum=4.0 must be at least 1 and at most initial=2.0"),
    ],
)
def test_what_makes_no_scale_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LossScale(**options)


def refused(model: nn.Module, use: Callable[[DistributedOptimizer], Any]) -> None:
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    use(DistributedOptimizer(inner, model, comm=SingleProcess(), loss_scale=LossScale()))


def test_what_cannot_be_scaled_is_refused() -> None:
    with pytest.raises(UserError, match="'weight' is float16, in which unscaled gradients would underflow"):
        refused(nn.Linear(2, 2).half(), lambda optimizer: None)
    with pytest.raises(UserError, match="closure cannot be skipped"):
        refused(nn.Linear(2, 2), lambda optimizer: optimizer.step(lambda: None))
