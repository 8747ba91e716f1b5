"""Options that change over the first steps: the same on all ranks, exact to the byte, and lossless in sum."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer, UserError, compression
from disttrain.collectives import sent_bytes
from disttrain.comm import Communicator, simulate
from disttrain.compression.ramp import RankRamp, RatioRamp
from tests.support.compressing import Ranks, case_id, gradient, gradient_bytes

SHAPES = ((16, 40), (64, 24))
STEPS = 4


def test_a_ratio_changes_by_the_same_factor_each_step() -> None:
    ramp = RatioRamp(start=0.16, steps=4)
    assert [ramp.at(step, 0.01) for step in range(7)] == pytest.approx([0.16, 0.08, 0.04, 0.02, 0.01, 0.01, 0.01])
    assert ramp.at(4, 0.01) == ramp.at(10**6, 0.01) == 0.01


@pytest.mark.parametrize(("start", "end", "ranks"), [(1, 4, [1, 2, 2, 3, 4, 4]), (6, 2, [6, 5, 4, 3, 2, 2])])
def test_a_rank_changes_in_whole_numbers(start: int, end: int, ranks: list[int]) -> None:
    assert [RankRamp(start=start, steps=4).at(step, end) for step in range(6)] == ranks


def padded(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16


def bytes_sent(ranks: Ranks) -> list[int]:
    """By step; the same on all ranks."""
    num_ranks = len(ranks.buckets)
    by_rank = [
        [sum(sent_bytes(item, num_ranks, rank) for item in items) for rank, items in enumerate(step)]
        for step in ranks.started
    ]
    assert all(len(set(step)) == 1 for step in by_rank)
    return [step[0] for step in by_rank]


CASES: list[dict[str, Any]] = [
    {"name": "topk", "ratio": 0.01, "ratio_ramp": {"start": 0.5, "steps": STEPS}},
    {"name": "topk", "ratio": 0.02, "ratio_ramp": {"start": 0.2, "steps": STEPS}, "selection": "estimated"},
    {"name": "topk", "ratio": 0.02, "ratio_ramp": {"start": 0.2, "steps": STEPS}, "exchange": "two_stage"},
    {"name": "powersgd", "rank": 4, "rank_ramp": {"start": 1, "steps": STEPS}},
    {"name": "powersgd", "rank": 1, "rank_ramp": {"start": 5, "steps": STEPS}},
    {"name": "powersgd", "rank": 4, "rank_ramp": {"start": 1, "steps": STEPS}, "alternating": True},
    {"name": "powersgd", "rank": 1, "rank_ramp": {"start": 5, "steps": STEPS}, "alternating": True},
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("world_size", [1, 3])
def test_replicas_are_identical_and_nothing_is_lost(case: dict[str, Any], world_size: int) -> None:
    ranks = Ranks.make(case, world_size, SHAPES)
    means = ranks.steps(STEPS + 4)
    assert all(torch.equal(mean, step[0]) for step in means for mean in step)
    residual = sum(state.residual for state in ranks.states) / world_size
    if "server_residual" in ranks.states[0].tensors:
        residual = residual + torch.cat([state.server_residual for state in ranks.states])
    given = sum(gradient(step, rank, ranks.numel) for step in range(STEPS + 4) for rank in range(world_size))
    torch.testing.assert_close(sum(step[0] for step in means) + residual, given / world_size, rtol=0, atol=1e-10)


def test_topk_sends_what_the_ratio_of_the_step_says() -> None:
    ranks = Ranks.make(CASES[0], 2, SHAPES)
    ranks.steps(2)
    ranks.step([gradient(2, rank, ranks.numel) for rank in range(2)], commit=False)  # a skipped step
    ranks.steps(4, first=2)
    ratios = [0.5 * (0.01 / 0.5) ** (step / STEPS) for step in (0, 1, 2, 2, 3, 4, 4)]
    counts = [round(ratio * ranks.numel) for ratio in ratios]
    assert bytes_sent(ranks) == [padded(8 * count) + padded(4 * count) for count in counts]


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize(("start", "rank"), [(1, 4), (5, 1)])
def test_powersgd_sends_factors_of_the_rank_of_the_step(start: int, rank: int, alternating: bool) -> None:
    ramp = {"start": start, "steps": STEPS}
    ranks = Ranks.make({"name": "powersgd", "rank": rank, "rank_ramp": ramp, "alternating": alternating}, 2, SHAPES)
    ranks.steps(STEPS + 2)
    wanted = []
    for step in range(STEPS + 2):
        rows, columns = (8 * RankRamp(**ramp).at(step, rank) * sum(shape[side] for shape in SHAPES) for side in (0, 1))
        wanted.append((rows, columns)[step % 2] if alternating else rows + columns)
    assert bytes_sent(ranks) == wanted
    assert ranks.states[0].q.numel() == 5 * 64 if start == 5 else 4 * 64


def test_a_ramp_that_leads_nowhere_changes_nothing() -> None:
    plain = Ranks.make({"name": "powersgd", "rank": 3}, 2, SHAPES).steps(4)
    ramped = Ranks.make({"name": "powersgd", "rank": 3, "rank_ramp": {"start": 3, "steps": 2}}, 2, SHAPES).steps(4)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(plain, ramped, strict=True))


def test_a_growing_rank_reaches_what_the_full_rank_reaches() -> None:
    """One matrix over and over: power iteration on it converges, whichever columns were there first."""
    factors = [gradient(0, side, 40 * 4).view(40, 4) for side in (0, 1)]
    matrix = (factors[0] @ factors[1].T).reshape(-1)  # of rank 4
    ranks = Ranks.make({"name": "powersgd", "rank": 4, "rank_ramp": {"start": 1, "steps": 3}}, 1, ((40, 40),))
    for _ in range(8):
        (mean,) = ranks.step([matrix])
    residual = ranks.states[0].residual
    torch.testing.assert_close(mean, matrix, rtol=0, atol=1e-8)
    assert residual.norm() < 1e-8 * matrix.norm()


def test_a_resumed_run_continues_the_ramp() -> None:
    spec = {"name": "topk", "ratio": 0.01, "min_numel": 0, "ratio_ramp": {"start": 0.5, "steps": 4}}

    def run(comm: Communicator) -> tuple[int, int]:
        def make() -> tuple[nn.Module, DistributedOptimizer]:
            model = nn.Linear(40, 40)
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            return model, DistributedOptimizer(sgd, model, comm=comm, compressor=spec)

        def step(model: nn.Module, optimizer: DistributedOptimizer) -> int:
            model(torch.ones(3, 40) * (comm.rank + 1)).square().mean().backward()
            optimizer.step()
            return gradient_bytes(optimizer)

        model, optimizer = make()
        for _ in range(3):
            step(model, optimizer)
        resumed, other = make()
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return step(model, optimizer), step(resumed, other)

    for going_on, resumed in simulate(2, run):
        assert going_on == resumed


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "topk", "ratio_ramp": {"start": 2, "steps": 3}}, r"compressor\.ratio_ramp\.start=2 should be less"),
        ({"name": "topk", "ratio_ramp": {"start": 0.5, "steps": 0}}, r"ratio_ramp\.steps=0 should be greater"),
        (
            {"name": "topk", "ratio_ramp": {"start": 0.5}},
            r"missing key 'compressor\.ratio_ramp\.steps': committed steps",
        ),
        (
            {"name": "topk", "ratio_ramp": {"strt": 0.5, "steps": 1}},
            r"ratio_ramp\.strt.*'compressor\.ratio_ramp\.start'",
        ),
        ({"name": "topk", "ratio_ramp": 3}, r"ratio_ramp=3 should be a section with keys steps, start"),
        ({"name": "powersgd", "rank_ramp": {"start": 1.5, "steps": 3}}, r"rank_ramp\.start=1\.5 should be a valid int"),
    ],
)
def test_a_wrong_ramp_is_one_clear_line(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compression.Policy.build(spec)
