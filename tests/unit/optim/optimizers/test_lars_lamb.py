"""LARS and LAMB against plain implementations of their papers, and the properties that the papers claim."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from disttrain.optim.optimizers.lamb import LAMB
from disttrain.optim.optimizers.lars import LARS
from disttrain.optim.optimizers.layerwise import trust_ratios

SHAPES = [(5, 4), (4,), (3, 2, 2), (), (2, 7)]
DTYPE = torch.float64
NUM_STEPS = 50


def weights(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=DTYPE) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    return weights(100 + step)


def rate(step: int) -> float:
    """A learning rate with jumps, so that momentum with and without the learning rate differ."""
    return 0.3 if step % 20 < 10 else 0.02


def follow(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def make(cls: type[torch.optim.Optimizer], **options: Any) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    parameters = [torch.nn.Parameter(value) for value in weights()]
    return cls(parameters, **options), parameters  # type: ignore[call-arg]


def lars_of_the_paper(momentum: float, weight_decay: float, eta: float, corrected: bool = False) -> list[torch.Tensor]:
    """Algorithm 1 of arXiv:1708.03888, one parameter at a time; biases take SGD's steps."""
    result = []
    for index, w in enumerate(weights()):
        v = torch.zeros_like(w)
        last = rate(0)
        for step in range(NUM_STEPS):
            g, gamma = gradients(step)[index], rate(step)
            beta = weight_decay if w.dim() > 1 else 0.0
            local = eta * w.norm() / (g.norm() + beta * w.norm()) if w.dim() > 1 else 1.0
            if corrected:  # Goyal et al. 2017, equation 10 with remark 3
                v = v * gamma / last
                last = gamma
            v = momentum * v + gamma * local * (g + beta * w)
            w = w - v
        result.append(w)
    return result


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.1)])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("foreach", [None, True])
def test_lars_is_the_papers(momentum: float, weight_decay: float, corrected: bool, foreach: bool | None) -> None:
    options = {"trust_coefficient": 0.02, "momentum_correction": corrected, "foreach": foreach}
    ours = follow(*make(LARS, lr=1.0, momentum=momentum, weight_decay=weight_decay, **options))
    for value, expected in zip(ours, lars_of_the_paper(momentum, weight_decay, 0.02, corrected), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)


def lamb_of_the_paper(
    weight_decay: float, corrected: bool, bounds: tuple[float, float] | None = None
) -> list[torch.Tensor]:
    """Algorithm 2 of arXiv:1904.00962v5, one parameter at a time; biases take Adam's steps."""
    beta1, beta2, eps = 0.8, 0.95, 1e-6
    result = []
    for index, x in enumerate(weights()):
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        for step in range(NUM_STEPS):
            g, t = gradients(step)[index], step + 1
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            m_hat = m / (1 - beta1**t) if corrected else m
            v_hat = v / (1 - beta2**t) if corrected else v
            r = m_hat / (v_hat.sqrt() + eps)
            if x.dim() > 1:
                update = r + weight_decay * x
                phi = x.norm() if bounds is None else x.norm().clamp(*bounds)
                x = x - rate(step) * phi / update.norm() * update
            else:
                x = x - rate(step) * r
        result.append(x)
    return result


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("bounds", [None, (0.5, 2.0)])
@pytest.mark.parametrize("foreach", [None, True])
def test_lamb_is_the_papers(
    weight_decay: float, corrected: bool, bounds: tuple[float, float] | None, foreach: bool | None
) -> None:
    options: dict[str, Any] = {"bias_correction": corrected, "norm_bounds": bounds, "foreach": foreach}
    ours = follow(*make(LAMB, lr=1.0, betas=(0.8, 0.95), weight_decay=weight_decay, **options))
    for value, expected in zip(ours, lamb_of_the_paper(weight_decay, corrected, bounds), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)


def first_steps(cls: type[torch.optim.Optimizer], scale: float, **options: Any) -> list[float]:
    optimizer, parameters = make(cls, **options)
    for parameter, gradient in zip(parameters, gradients(0), strict=True):
        parameter.grad = gradient * scale
    optimizer.step()
    return [(p.detach() - w).norm().item() for p, w in zip(parameters, weights(), strict=True) if p.dim() > 1]


@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e6])
def test_the_length_of_lars_steps_does_not_change_with_the_gradients(scale: float) -> None:
    lengths = first_steps(LARS, scale, lr=2.0, trust_coefficient=0.01)
    assert lengths == pytest.approx(first_steps(LARS, 1.0, lr=2.0, trust_coefficient=0.01), rel=1e-9)
    assert lengths == pytest.approx([2.0 * 0.01 * w.norm().item() for w in weights() if w.dim() > 1], rel=1e-9)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("corrected", [True, False])
def test_the_length_of_lamb_steps_is_the_rate_times_that_of_the_weights(weight_decay: float, corrected: bool) -> None:
    lengths = first_steps(LAMB, 5.0, lr=0.07, weight_decay=weight_decay, bias_correction=corrected)
    assert lengths == pytest.approx([0.07 * w.norm().item() for w in weights() if w.dim() > 1], rel=1e-9)


@pytest.mark.parametrize("cls", [LARS, LAMB])
def test_a_parameter_with_a_norm_of_zero_can_move(cls: type[torch.optim.Optimizer]) -> None:
    at_zero, unmoved = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = cls([at_zero, unmoved], lr=0.1)  # type: ignore[call-arg]
    at_zero.grad, unmoved.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()
    assert at_zero.abs().min() > 0
    assert torch.equal(unmoved, torch.ones(2, 2))
    assert optimizer.trust_ratios[at_zero] == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("cls", [LARS, LAMB])
def test_norms_of_half_precision_do_not_overflow(cls: type[torch.optim.Optimizer]) -> None:
    parameter = torch.nn.Parameter(torch.full((64, 64), 100.0, dtype=torch.float16))
    optimizer = cls([parameter], lr=30.0 if cls is LARS else 0.03)  # type: ignore[call-arg]
    parameter.grad = torch.full((64, 64), 2000.0, dtype=torch.float16)  # its norm is 128000
    optimizer.step()
    assert parameter.isfinite().all()
    assert (parameter < 100).all()


@pytest.mark.parametrize("cls", [LARS, LAMB])
def test_any_memory_layout_gives_the_same_result(cls: type[torch.optim.Optimizer]) -> None:
    values, gradient = torch.randn(6, 4, dtype=DTYPE), torch.randn(6, 4, dtype=DTYPE)
    results = []
    for parameter, grad in (
        (values.clone(), gradient),
        (values.t().contiguous().t(), gradient),
        (values.clone(), gradient.t().contiguous().t()),
        (values.repeat(1, 2)[:, :4], gradient.clone()),
    ):
        parameter.requires_grad_(True)
        optimizer = cls([parameter], lr=0.1, weight_decay=0.1)  # type: ignore[call-arg]
        for _ in range(3):
            parameter.grad = grad.clone(memory_format=torch.preserve_format)
            optimizer.step()
        results.append(parameter.detach())
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [LARS, LAMB])
def test_keys_of_a_group_set_what_adapts_and_decays(cls: type[torch.optim.Optimizer]) -> None:
    bias, matrix = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, 3))
    groups = [{"params": [bias], "adapt": True, "decay_1d": True}, {"params": [matrix], "adapt": False}]
    optimizer = cls(groups, lr=0.1, weight_decay=0.5)  # type: ignore[call-arg]
    bias.grad, matrix.grad = torch.zeros(3), torch.zeros(3, 3)
    optimizer.step()
    assert list(optimizer.trust_ratios) == [bias]  # type: ignore[attr-defined]
    assert (bias < 1).all()
    assert (matrix < 1).all(), "it decays, without a trust ratio"


@pytest.mark.parametrize("cls", [LARS, LAMB])
def test_trust_ratios_by_name(cls: type[torch.optim.Optimizer]) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = cls(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    assert trust_ratios(optimizer, model) == {}
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    ratios = trust_ratios(optimizer, model)
    assert ratios.keys() == {"trust_ratio/weight"}
    if cls is LARS:
        assert ratios["trust_ratio/weight"] == pytest.approx(1e-3 * before.norm().item() / math.sqrt(6), rel=1e-5)
    assert trust_ratios(torch.optim.SGD(model.parameters(), lr=0.1), model) == {}


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (LARS, {"lr": -1.0}),
        (LARS, {"lr": 1.0, "momentum": 1.0}),
        (LARS, {"lr": 1.0, "trust_coefficient": 0.0}),
        (LAMB, {"lr": 1.0, "betas": (0.9, 1.0)}),
        (LAMB, {"lr": 1.0, "eps": 0.0}),
        (LAMB, {"lr": 1.0, "norm_bounds": (2.0, 1.0)}),
        (LAMB, {"lr": 1.0, "weight_decay": math.nan}),
    ],
)
def test_arguments_out_of_bounds_are_refused(cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must"):
        make(cls, **options)


@pytest.mark.parametrize("cls", [LARS, LAMB])
def test_a_loaded_state_dict_continues_bit_for_bit(cls: type[torch.optim.Optimizer]) -> None:
    optimizer, parameters = make(cls, lr=0.1)
    follow(optimizer, parameters)
    other, copies = make(cls, lr=0.1)
    with torch.no_grad():
        for value, parameter in zip(copies, parameters, strict=True):
            value.copy_(parameter)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for value, expected in zip(follow(other, copies), follow(optimizer, parameters), strict=True):
        assert torch.equal(value, expected)
