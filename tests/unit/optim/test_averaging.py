from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer, UserError, WeightAverage
from disttrain.comm import Communicator, SingleProcess, simulate

with torch.random.fork_rng():
    torch.manual_seed(5)
    TEMPLATE = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    INPUTS = torch.randn(9, 12, 5, dtype=torch.float64)


def steps(comm: Communicator, count: int = 9, compressor: Any = "dense", **options: Any) -> dict[str, torch.Tensor]:
    """Return the average after ``count`` steps, in which each rank has its part of the batch."""
    model = copy.deepcopy(TEMPLATE).eval()  # fixed statistics, since those of a batch depend on how it is split
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9), model, comm=comm, compressor=compressor
    )
    average = WeightAverage(optimizer, **options)
    for inputs in INPUTS[:count]:
        optimizer.zero_grad()
        model(inputs.chunk(comm.world_size)[comm.rank]).square().mean().backward()
        optimizer.step()
        average.update()
    return {name: tensor.clone() for name, tensor in average.state_dict().items()}


@pytest.mark.parametrize("options", [{"decay": 0.9}, {"decay": 0.99, "warmup": False}, {"after_steps": 3}], ids=str)
def test_ranks_have_the_average_of_one_process(options: dict[str, Any]) -> None:
    """The reference is the definition in plain torch: one process, the joined batch."""
    model = copy.deepcopy(TEMPLATE).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    expected: dict[str, torch.Tensor] = {}
    for step, inputs in enumerate(INPUTS):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        num = step + 1 - options.get("after_steps", 0)
        decay = options.get("decay", 0.999)
        if options.get("warmup", True):
            decay = min(decay, (1 + num) / (10 + num))
        for name, tensor in model.named_parameters():
            if num == 1:
                expected[name] = tensor.detach().clone()
            elif num > 1:
                expected[name] = decay * expected[name] + (1 - decay) * tensor.detach()
    results = simulate(4, lambda comm: steps(comm, **options))
    for result in results:
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value, rtol=0, atol=1e-10)
            assert torch.equal(result[name], results[0][name]), "replicas are bit-identical"


@pytest.mark.parametrize("compressor", ["efsign", {"name": "topk", "ratio": 0.2, "min_numel": 1}], ids=str)
def test_averages_are_bit_identical_on_all_ranks_with_compression(compressor: Any) -> None:
    results = simulate(3, lambda comm: steps(comm, compressor=compressor, decay=0.9))
    assert all(torch.equal(result[name], results[0][name]) for result in results for name in result)


def test_a_skipped_step_does_not_change_the_average() -> None:
    def run(bad: bool) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(TEMPLATE).eval()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.2), model, comm=SingleProcess())
        average = WeightAverage(optimizer, decay=0.9)
        for factor in (1.0, 1.0, float("inf"), 1.0) if bad else (1.0, 1.0, 1.0):
            optimizer.zero_grad()
            (model(INPUTS[0]).square().mean() * factor).backward()
            optimizer.step()
            average.update()
        assert average.num_steps == 3
        return average.state_dict()

    assert all(torch.equal(value, run(bad=True)[name]) for name, value in run(bad=False).items())


def test_the_model_has_the_average_inside_the_context_and_its_own_weights_after() -> None:
    model = copy.deepcopy(TEMPLATE)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.2), model, comm=SingleProcess())
    average = WeightAverage(optimizer, decay=0.5, warmup=False)
    for inputs in INPUTS[:3]:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        average.update()
    own = copy.deepcopy(model.state_dict())
    wanted = copy.deepcopy(average.state_dict())
    assert {"1.running_mean", "1.running_var"} < wanted.keys()
    assert not torch.equal(own["1.running_mean"], wanted["1.running_mean"])
    seen: dict[str, torch.Tensor] = {}

    def fail_inside() -> None:
        with average.applied():
            seen.update(copy.deepcopy(model.state_dict()))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail_inside()
    assert all(torch.equal(seen[name], value) for name, value in wanted.items())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in own.items())
    assert all(torch.equal(average.state_dict()[name], value) for name, value in wanted.items())


def test_synchronized_statistics_are_the_mean_over_ranks() -> None:
    def run(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        model = copy.deepcopy(TEMPLATE)
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.2), model, comm=comm)
        average = WeightAverage(optimizer, decay=0.5)
        for inputs in INPUTS[:3]:
            optimizer.zero_grad()
            model(inputs.chunk(comm.world_size)[comm.rank]).square().mean().backward()
            optimizer.step()
            average.update()
        own = average.tensors["1.running_mean"].clone()
        average.synchronize_buffers()
        return own, average.tensors["1.running_mean"]

    results = simulate(3, run)
    assert not torch.equal(results[0][0], results[1][0])
    for _, mean in results:
        torch.testing.assert_close(mean, torch.stack([own for own, _ in results]).mean(0), rtol=0, atol=1e-14)
        assert torch.equal(mean, results[0][1])


def test_invalid_arguments_and_states_are_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.2), model, comm=SingleProcess())
    with pytest.raises(UserError, match=r"decay=1.0 must be above 0 and below 1"):
        WeightAverage(optimizer, decay=1.0)
    with pytest.raises(UserError, match="after_steps=-1 must be at least 0"):
        WeightAverage(optimizer, after_steps=-1)
    with pytest.raises(UserError, match="belongs to another model: 'bias' is only in the model"):
        WeightAverage(optimizer).load_state_dict({"weight": torch.zeros(2, 2)}, 1)
