from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer, UserError
from disttrain.comm import Communicator, SingleProcess, simulate

with torch.random.fork_rng():
    torch.manual_seed(7)
    TEMPLATE = nn.Sequential(
        nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)
    ).double()
    INPUTS = torch.randn(10, 24, 5, dtype=torch.float64)
UNFREEZE_AT = {3: ["4."], 6: ["2.", "0."]}  # before these steps; the head is trained from the start
LAST = 10


def frozen_model() -> nn.Module:
    model = copy.deepcopy(TEMPLATE)
    for layer in (model[0], model[2], model[4]):
        layer.requires_grad_(False)
    return model


def of(model: nn.Module, prefixes: list[str]) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.startswith(tuple(prefixes))]


def wrap(model: nn.Module, comm: Communicator, compressor: Any) -> DistributedOptimizer:
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    return DistributedOptimizer(inner, model, comm=comm, compressor=compressor, bucket_mb=0.0005)


def steps(
    model: nn.Module,
    optimizer: Any,
    first: int,
    last: int,
    rank: int = 0,
    world_size: int = 1,
    unfreeze: dict[int, list[str]] = UNFREEZE_AT,
) -> None:
    for step in range(first, last):
        due = of(model, unfreeze.get(step, ["none"]))
        assert not any(parameter.requires_grad for parameter in due)
        if isinstance(optimizer, DistributedOptimizer):
            optimizer.unfreeze(due)
        else:
            for parameter in due:
                parameter.requires_grad_(True)
        optimizer.zero_grad()
        inputs = INPUTS[step].chunk(world_size)[rank]
        (model(inputs) - inputs[:, :3]).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1).clone() for parameter in model.parameters()])


TOPK: dict[str, Any] = {"name": "topk", "ratio": 0.1, "min_numel": 1}
COMPRESSORS: dict[str, Any] = {
    "dense": "dense",
    "topk": TOPK,
    "two stages": {"name": "efsign", "exchange": "two_stage", "min_numel": 1},
    "powersgd": {"name": "powersgd", "rank": 2, "min_numel": 1},
    "hierarchical": {**TOPK, "hierarchical": True},
    "rules": {"name": "dense", "rules": [{"match": "2.*", "use": TOPK}], "dense_steps": 4},
}


def test_ranks_equal_one_process_that_unfreezes() -> None:
    alone = frozen_model()
    steps(alone, torch.optim.AdamW(alone.parameters(), lr=0.01, fused=True), 0, LAST)

    def run(comm: Communicator) -> torch.Tensor:
        model = frozen_model()
        steps(model, wrap(model, comm, "dense"), 0, LAST, comm.rank, comm.world_size)
        return weights(model)

    results = simulate(4, run)
    for result in results:
        assert torch.equal(result, results[0])
        torch.testing.assert_close(result, weights(alone), rtol=0, atol=1e-10)
    assert not torch.equal(weights(alone)[:60], weights(frozen_model())[:60]), "the first layer was trained"


@pytest.fixture
def nodes_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTTRAIN_NODE_SIZE", "2")


@pytest.mark.usefixtures("nodes_of_two")
@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
@pytest.mark.parametrize("stop_at", [5, 6])
def test_resuming_with_a_new_model_is_bit_identical(compressor: Any, stop_at: int) -> None:
    def run(comm: Communicator, stop: bool) -> torch.Tensor:
        model = frozen_model()
        optimizer = wrap(model, comm, compressor)
        steps(model, optimizer, 0, stop_at, comm.rank, comm.world_size)
        if stop:
            state, kept = optimizer.state_dict(), copy.deepcopy(model.state_dict())
            model = frozen_model()
            model.load_state_dict(kept)
            optimizer = wrap(model, comm, compressor)
            for step in UNFREEZE_AT:
                if step < stop_at:
                    optimizer.unfreeze(of(model, UNFREEZE_AT[step]))
            optimizer.load_state_dict(state)
        steps(model, optimizer, stop_at, LAST, comm.rank, comm.world_size)
        return weights(model)

    expected = simulate(4, lambda comm: run(comm, False))
    for result in (*expected, *simulate(4, lambda comm: run(comm, True))):
        assert torch.equal(result, expected[0])


@pytest.mark.usefixtures("nodes_of_two")
@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
def test_what_was_trained_before_keeps_its_state(compressor: Any) -> None:
    def run(comm: Communicator) -> None:
        model = frozen_model()
        optimizer = wrap(model, comm, compressor)
        steps(model, optimizer, 0, 6, comm.rank, comm.world_size)
        before = optimizer.state_dict()
        optimizer.unfreeze(of(model, UNFREEZE_AT[6]))
        after = optimizer.state_dict()
        assert before["compression"]["step"] == after["compression"]["step"] == 6
        for kind in ("replicated", "per_rank"):
            for name, value in before["compression"][kind].items():
                assert torch.equal(after["compression"][kind][name], value), name
        for index, entry in before["state"].items():
            for key, value in entry.items():
                assert torch.equal(after["state"][index][key], value)
        fresh = {name: v for name, v in after["compression"]["per_rank"].items() if name[:2] in ("0.", "2.")}
        assert compressor == "dense" or fresh
        assert all(not value.any() for value in fresh.values())

    simulate(4, run)


@pytest.mark.parametrize("compressor", ["dense", COMPRESSORS["powersgd"]], ids=["dense", "powersgd"])
def test_unfreezing_equals_a_run_that_trains_all_from_there(compressor: Any) -> None:
    """Of what looks at each parameter for itself: other buckets, same numbers."""

    def run(comm: Communicator, afresh: bool) -> torch.Tensor:
        model = frozen_model()
        optimizer = wrap(model, comm, compressor)
        steps(model, optimizer, 0, 6, comm.rank, comm.world_size)
        optimizer.unfreeze(of(model, UNFREEZE_AT[6]))
        if afresh:
            state, kept = optimizer.state_dict(), copy.deepcopy(model.state_dict())
            model = copy.deepcopy(TEMPLATE)
            model.load_state_dict(kept)
            optimizer = wrap(model, comm, compressor)
            optimizer.load_state_dict(state)
        steps(model, optimizer, 6, LAST, comm.rank, comm.world_size, unfreeze={})
        return weights(model)

    unfrozen, afresh = (simulate(3, lambda comm, a=a: run(comm, a))[0] for a in (False, True))  # type: ignore[misc]
    torch.testing.assert_close(unfrozen, afresh, rtol=0, atol=1e-12)


def test_unfrozen_parameters_are_counted() -> None:
    def run(comm: Communicator) -> None:
        model = frozen_model()
        optimizer = wrap(model, comm, "dense")
        steps(model, optimizer, 0, 1, comm.rank, comm.world_size)
        assert optimizer.wire.last_step.dense_bytes == 4 * (12 * 3 + 3)
        optimizer.unfreeze(model.parameters())
        optimizer.unfreeze(model.parameters())  # again: nothing is left to do
        optimizer.zero_grad()
        model(INPUTS[0]).sum().backward()
        optimizer.step()
        assert optimizer.wire.last_step.dense_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())

    simulate(2, run)


def test_refuses_what_cannot_be_unfrozen() -> None:
    model = frozen_model()
    inner = torch.optim.SGD([*model[4].parameters(), *model[6].parameters()], lr=0.1)
    optimizer = DistributedOptimizer(inner, model, comm=SingleProcess())
    with pytest.raises(UserError, match=r"'2\.weight' cannot be unfrozen: give it to the torch optimizer before"):
        optimizer.unfreeze([model[2].weight])
    model(INPUTS[0]).sum().backward()
    with pytest.raises(UserError, match="between backward and step"):
        optimizer.unfreeze(model[4].parameters())

    def run(comm: Communicator) -> None:
        model = frozen_model()
        wrap(model, comm, "dense").unfreeze(model[2 + 2 * comm.rank].parameters())

    with pytest.raises(UserError, match="ranks unfreeze different parameters"):
        simulate(2, run)
