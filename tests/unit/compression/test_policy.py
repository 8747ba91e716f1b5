"""Which compressor a parameter gets: rules, the dense warmup, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer, UserError
from disttrain.comm import Communicator, simulate
from disttrain.compression import QSGD, Dense, Policy, PowerSGD, Rule, TopK
from tests.support.compressing import gradient_bytes

SHAPES = {
    "embedding.weight": (1000, 64),
    "block.norm.weight": (2048,),
    "block.linear.weight": (64, 64),
    "block.linear.bias": (64,),
    "head.weight": (500, 64),
}
RULES: list[dict[str, Any]] = [
    {"match": "embedding.*", "use": {"name": "topk", "ratio": 0.1}},
    {"match": "*.norm.*", "use": "dense"},
    {"min_numel": 30000, "use": {"name": "powersgd", "rank": 8}},
]

with torch.random.fork_rng():
    torch.manual_seed(0)
    MODEL = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
MIXED: dict[str, Any] = {
    "name": "topk",
    "ratio": 0.1,
    "min_numel": 0,
    "rules": [
        {"match": "2.*", "use": {"name": "powersgd", "rank": 1, "min_numel": 0}},
        {"match": "4.*", "use": {"name": "qsgd", "min_numel": 0, "error_feedback": True, "exchange": "two_stage"}},
    ],
}


def make(comm: Communicator, compressor: Any) -> tuple[nn.Module, DistributedOptimizer]:
    model = copy.deepcopy(MODEL)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, DistributedOptimizer(sgd, model, comm=comm, compressor=compressor, bucket_mb=0.002)


def step(comm: Communicator, model: nn.Module, optimizer: DistributedOptimizer, index: int, scale: float = 1) -> None:
    generator = torch.Generator().manual_seed(10 * index + comm.rank)
    optimizer.zero_grad()
    (scale * model(torch.randn(5, 8, generator=generator, dtype=torch.float64)).square().mean()).backward()
    optimizer.step()


def test_the_first_rule_that_applies_decides() -> None:
    policy = Policy.build({"name": "qsgd", "rules": RULES})
    assert policy.assign(SHAPES) == [TopK(ratio=0.1), Dense(), QSGD(), Dense(), PowerSGD(rank=8)]
    first = Policy.build({"name": "qsgd", "rules": [{"use": "dense", "min_numel": 64000}, RULES[2]]})
    assert first.assign(SHAPES) == [Dense(), Dense(), QSGD(), Dense(), PowerSGD(rank=8)]


def test_a_policy_can_be_made_of_its_parts_and_be_written_down() -> None:
    policy = Policy(compressor=TopK(), rules=(Rule(match="*.weight", use=PowerSGD(rank=2)),), dense_steps=3)
    assert Policy.build(policy) is policy
    assert Policy.build(policy.to_dict()) == policy
    assert Policy.build(TopK()) == Policy.build("topk") == Policy.build({"name": "topk"})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"match": "hed.*", "use": "dense"},
            r"rules\.1 \('hed\.\*'\) matches no trained parameter.*'head\.weight'",
        ),
        (
            {"min_numel": 10**6, "use": "dense"},
            r"no trained parameter: the largest is 'embedding\.weight' with 640",
        ),
        ({"match": "head.*", "min_numel": 32001, "use": "dense"}, r"the largest is 'head\.weight' with 32000"),
        ({"match": "embedding.*", "use": "dense"}, r"rules\.1 \('embedding\.\*'\) never decides"),
        ({"match": "block.linear.*", "use": {"name": "powersgd", "rank": 65}}, r"rank=65 .*at most 64\), .*lower it"),
    ],
)
def test_a_rule_that_does_not_suit_the_model_is_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Policy.build({"name": "dense", "rules": [RULES[0], rule]}).assign(SHAPES)


def test_a_rank_above_some_matrices_only_is_fine() -> None:
    assert PowerSGD(rank=65) == Policy.build({"name": "powersgd", "rank": 65}).assign({**SHAPES, "x": (900, 900)})[-1]


def test_several_compressors_in_one_model_keep_replicas_identical_and_their_state_can_be_saved() -> None:
    def run(comm: Communicator) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        model, optimizer = make(comm, MIXED)
        names = {bucket.compressor.name for bucket in optimizer.reducer.buckets}
        assert names == {"topk", "powersgd", "qsgd", "dense"}
        for index in range(3):
            step(comm, model, optimizer, index)
        saved, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
        for index in range(3, 6):
            step(comm, model, optimizer, index)
        resumed, other = make(comm, MIXED)
        resumed.load_state_dict(weights)
        other.load_state_dict(saved)
        for index in range(3, 6):
            step(comm, resumed, other, index)
        return list(model.parameters()), list(resumed.parameters())

    results = simulate(3, run)
    for model, resumed in results:
        for parameter, again, first in zip(model, resumed, results[0][0], strict=True):
            assert torch.equal(parameter, first)
            assert torch.equal(parameter, again)


def test_a_dense_warm_up_counts_committed_steps_and_is_over_after_a_resumption() -> None:
    spec = {**MIXED, "dense_steps": 2}

    def run(comm: Communicator) -> tuple[list[int], list[int], torch.Tensor]:
        model, optimizer = make(comm, spec)
        plain, dense = make(comm, "dense")
        sent = []
        for index, scale in enumerate([1.0, torch.inf, 1.0, 1.0]):
            step(comm, model, optimizer, index, scale)
            sent.append(gradient_bytes(optimizer))
            if index < 3:
                step(comm, plain, dense, index, scale)
                assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        resumed, other = make(comm, spec)
        other.load_state_dict(optimizer.state_dict())
        step(comm, resumed, other, 9)
        return sent, [gradient_bytes(other)], sum(p.detach().sum() for p in model.parameters())

    num_bytes = 8 * sum(parameter.numel() for parameter in MODEL.parameters())
    for sent, after, _ in simulate(2, run):
        assert len(set(sent[:3])) == 1, "a skipped step does not count"
        assert sent[0] >= num_bytes > 2 * sent[3]
        assert after == sent[3:]
