"""What theory says of each compressor: contraction, unbiasedness and variance, linearity, and the like.

Where chance comes in, seeds are fixed, and bounds are such that a right program fails for one seed in a million.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from disttrain import compression
from tests.support.compressing import Ranks, Shapes, case_id, gradient, one_step

pytestmark = pytest.mark.usefixtures("one_thread")

MATRIX: Shapes = ((16, 64),)
NUMEL = 1024


def draw(kind: str, numel: int = NUMEL, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(numel, generator=generator, dtype=torch.float64)
    uniform = torch.rand(numel, generator=generator, dtype=torch.float64)
    match kind:
        case "gaussian":
            return normal
        case "laplace":
            return normal.sign() * -uniform.log()
        case "student":  # 3 degrees of freedom: a normal over the root of a mean of 3 squares
            return normal / torch.randn(3, numel, generator=generator, dtype=torch.float64).square().mean(0).sqrt()
        case "spike":
            return torch.nn.functional.one_hot(torch.tensor(numel // 3), numel).double() * 3
    raise ValueError(kind)


every_kind = pytest.mark.parametrize("kind", ["gaussian", "laplace", "student", "spike"])


def share_lost(x: torch.Tensor, kept: torch.Tensor) -> float:
    return float((x - kept).square().sum() / x.square().sum())


# Contractions. A first step without a residual gives C(x).


@every_kind
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5])
def test_topk_is_a_contraction(kind: str, ratio: float) -> None:
    x, k = draw(kind), round(ratio * NUMEL)
    kept = one_step({"name": "topk", "ratio": ratio}, x)
    assert share_lost(x, kept) <= 1 - k / NUMEL
    largest = x.abs().sort(descending=True).values[:k].square().sum()
    assert share_lost(x, kept) == pytest.approx(float(1 - largest / x.square().sum()), abs=1e-12)


@every_kind
@pytest.mark.parametrize("value_bits", [None, 2, 4, 8, 16])
def test_topk_is_a_contraction_in_every_chunk(kind: str, value_bits: int | None) -> None:
    x = draw(kind)
    kept = one_step({"name": "topk", "ratio": 0.1, "chunk_size": 128, "value_bits": value_bits}, x)
    for chunk, sent in zip(x.view(-1, 128), kept.view(-1, 128), strict=True):
        positions = chunk.abs().sort(descending=True, stable=True).indices[:13]
        assert sent.count_nonzero() == chunk[positions].count_nonzero()
        taken, rounded = chunk[positions], sent[positions]
        assert ((taken - rounded).abs() <= taken.abs()).all()
        if value_bits is not None and value_bits <= 8:
            step = (taken.abs().max() - taken.abs().min()) / (2 ** (value_bits - 1) - 1)
            assert ((taken - rounded).abs() <= step / 2 * (1 + 1e-12) + 1e-14).all()
        else:
            tolerance = 0 if value_bits is None else 2.0**-8
            torch.testing.assert_close(rounded, taken, rtol=tolerance, atol=0)


@every_kind
@pytest.mark.parametrize("case", [{"name": "topk", "selection": "estimated"}, {"name": "threshold"}], ids=case_id)
def test_what_exceeds_a_threshold_is_a_contraction_by_the_number_sent(case: dict[str, Any], kind: str) -> None:
    x = draw(kind)
    kept = one_step({**case, "ratio": 0.1}, x)
    num_sent = int(kept.count_nonzero())
    assert num_sent > 0
    assert torch.equal(kept[kept != 0], x[kept != 0])
    assert share_lost(x, kept) <= 1 - num_sent / NUMEL


@every_kind
def test_efsign_loses_exactly_what_its_angle_says(kind: str) -> None:
    x = draw(kind)
    kept = one_step({"name": "efsign", "block_size": 64}, x).view(-1, 64)
    for block, sent in zip(x.view(-1, 64), kept, strict=True):
        wanted = float(block.square().sum() - block.abs().sum() ** 2 / 64)
        assert float((block - sent).square().sum()) == pytest.approx(wanted, abs=1e-12)


@every_kind
def test_efsign_of_two_bits_loses_exactly_what_its_means_leave(kind: str) -> None:
    x = draw(kind)
    kept, of_one_bit = (one_step({"name": "efsign", "bits": bits, "block_size": 64}, x).view(-1, 64) for bits in (2, 1))
    for block, sent, coarse in zip(x.view(-1, 64), kept, of_one_bit, strict=True):
        magnitude, captured = block.abs(), 0.0
        for level in (magnitude < magnitude.mean(), magnitude >= magnitude.mean()):
            if level.any():
                mean = float(magnitude[level].mean())
                torch.testing.assert_close(sent[level], mean * block[level].sign(), rtol=1e-12, atol=1e-14)
                captured += int(level.sum()) * mean**2
        lost = float((block - sent).square().sum())
        assert lost == pytest.approx(float(block.square().sum()) - captured, abs=1e-11)
        assert lost <= float((block - coarse).square().sum()) + 1e-12


@every_kind
def test_onebit_loses_exactly_what_its_means_leave(kind: str) -> None:
    x = draw(kind)
    kept = one_step({"name": "onebit"}, x, MATRIX).view(16, 64)
    for column, sent in zip(x.view(16, 64), kept, strict=True):
        captured = 0.0
        for entries, values in ((column[column < 0], sent[column < 0]), (column[column >= 0], sent[column >= 0])):
            if len(entries):
                torch.testing.assert_close(values, entries.mean().expand_as(values), rtol=1e-12, atol=1e-14)
                captured += float(entries.mean()) ** 2 * len(entries)
        lost = float((column - sent).square().sum())
        assert lost == pytest.approx(float(column.square().sum()) - captured, abs=1e-11)


@every_kind
@pytest.mark.parametrize(("name", "levels"), [("blockwise8", 127), ("blockwise4", 7)])
def test_blockwise_errs_by_half_a_level_at_most(name: str, levels: int, kind: str) -> None:
    x = draw(kind)
    error = (x - one_step({"name": name, "block_size": 64}, x)).view(-1, 64).abs()
    assert (error <= x.view(-1, 64).abs().amax(1, keepdim=True) / levels * (0.5 + 1e-12)).all()


@every_kind
@pytest.mark.parametrize("alternating", [False, True])
def test_powersgd_never_loses_more_than_there_is(kind: str, alternating: bool) -> None:
    x = draw(kind)
    ranks = Ranks.make({"name": "powersgd", "rank": 3, "alternating": alternating}, 1, MATRIX)
    lost = []
    for _ in range(200):
        lost.append(share_lost(x, ranks.step([x])[0]))
        assert lost[-1] <= 1 + 1e-12
        ranks.states[0].residual.zero_()
    values = torch.linalg.svdvals(x.view(16, 64)).square()
    assert lost[-1] == pytest.approx(float(values[3:].sum() / values.sum()), abs=0.01)


def test_randomk_sends_every_entry_with_the_same_probability() -> None:
    numel, ratio, num_draws = 8, 0.6, 4000  # strata of 1 and of 2
    k = round(ratio * numel)
    x = torch.arange(1, numel + 1, dtype=torch.float64)
    case = {"name": "randomk", "ratio": ratio, "error_feedback": False}
    draws = torch.stack([one_step(case, x, step=step) for step in range(num_draws)])
    assert ((draws == 0) | (draws == x)).all()
    assert ((draws != 0).sum(1) == k).all()
    share = k / numel
    frequency = (draws != 0).double().mean(0)
    assert ((frequency - share).abs() <= bernstein(share * (1 - share), 1.0, numel, num_draws)).all()
    assert len({tuple(row.nonzero().view(-1).tolist()) for row in draws}) > 20


# Unbiased ones: for each entry of x the variance and the range of what is sent for it.


def qsgd(x: torch.Tensor, bits: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    unit = largest_of_block(x) / (2 ** (bits - 1) - 1)
    share = (x.abs() / unit).frac()
    return unit**2 * share * (1 - share), unit


def terngrad(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = largest_of_block(x)
    return largest * x.abs() - x.square(), largest


def natural(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    below = 2.0 ** x.abs().log2().floor()
    return (x.abs() - below) * (2 * below - x.abs()), below


def scaled_randomk(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    factor = x.numel() / round(0.3 * x.numel())
    return x.square() * (factor - 1), x.abs() * factor


def largest_of_block(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 64).abs().amax(1, keepdim=True).expand(-1, 64).reshape(-1)


def bernstein(variance: Any, spread: Any, num_means: int, num_draws: int) -> Any:
    """How far each of several means of draws may be off, all of them together with a chance below 1e-6."""
    log = math.log(2 * num_means / 1e-6)
    return (2 * variance * log / num_draws) ** 0.5 + 2 * spread * log / (3 * num_draws)


UNBIASED: list[tuple[dict[str, Any], Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], float]] = [
    ({"name": "qsgd", "bits": 2, "block_size": 64}, lambda x: qsgd(x, 2), 8.0),  # sqrt(n) / s
    ({"name": "qsgd", "bits": 4, "block_size": 64}, lambda x: qsgd(x, 4), 8 / 7),
    ({"name": "qsgd", "bits": 8, "block_size": 64}, lambda x: qsgd(x, 8), 64 / 127**2),  # n / s^2
    ({"name": "terngrad", "clip": None, "block_size": 64}, terngrad, 8.0),
    ({"name": "natural", "block_size": 64}, natural, 1 / 8),
    ({"name": "randomk", "ratio": 0.3, "error_feedback": False, "scaled": True}, scaled_randomk, 1024 / 307 - 1 + 1e-9),
]


@pytest.mark.parametrize("kind", ["gaussian", "student"])
@pytest.mark.parametrize(("case", "law", "omega"), UNBIASED, ids=lambda v: case_id(v) if isinstance(v, dict) else "")
def test_is_unbiased_with_the_variance_of_theory(
    case: dict[str, Any], law: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], omega: float, kind: str
) -> None:
    x, num_draws = draw(kind), 2000
    ranks = Ranks.make(case, 1, MATRIX)
    errors = torch.stack([ranks.step([x])[0] - x for _ in range(num_draws)])
    variance, spread = law(x)
    assert variance.sum() <= omega * x.square().sum()
    # Noise comes in steps of 2^-16 of the range, which may move a mean by as much.
    bound = bernstein(variance, spread, NUMEL, num_draws) + spread * 2.0**-16
    assert (errors.mean(0).abs() <= bound).all()
    squares = errors.square().sum(1)
    assert (squares.mean() - variance.sum()).abs() <= 5.5 * squares.std() / math.sqrt(num_draws)


@pytest.mark.parametrize("name", ["qsgd", "terngrad", "natural"])
def test_ranks_round_independently(name: str) -> None:
    def error(world_size: int) -> float:
        ranks = Ranks.make({"name": name}, world_size, MATRIX)
        x = draw("gaussian").clamp(-2.4, 2.4)  # terngrad clips nothing of it
        return float((ranks.step([x] * world_size)[0] - x).norm())

    assert error(16) < 0.5 * error(1)


def test_terngrad_clips_each_layer_by_its_own_deviation() -> None:
    x = torch.cat([draw("student"), 1000 * draw("gaussian", seed=1)])
    ranks = Ranks.make({"name": "terngrad", "clip": 1.0, "block_size": 64}, 1, ((16, 64), (16, 64)))
    sent = ranks.step([x])[0].view(2, NUMEL).abs().amax(1)
    deviations = x.view(2, NUMEL).square().mean(1).sqrt()
    torch.testing.assert_close(sent, deviations, rtol=1e-12, atol=0)


# Linear ones.


@pytest.mark.parametrize(
    "case",
    [
        {"name": "powersgd", "rank": 2},
        {"name": "powersgd", "rank": 2, "alternating": True},
        {"name": "randomk", "ratio": 0.2},
        {"name": "randomk", "ratio": 0.2, "error_feedback": False, "scaled": True},
    ],
    ids=case_id,
)
def test_many_ranks_are_one_on_their_mean(case: dict[str, Any]) -> None:
    def mean_of_four(step: int, rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.stack([gradient(step, other, numel, dtype) for other in range(4)]).mean(0)

    many = Ranks.make(case, 4).steps(5)
    one = Ranks.make(case, 1).steps(5, mean_of_four)
    for a, b in zip(many, one, strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("alternating", [False, True])
def test_powersgd_recovers_what_has_its_rank(alternating: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((16, 2), (2, 64)))
    x = (left @ right).view(-1)
    ranks = Ranks.make({"name": "powersgd", "rank": 2, "alternating": alternating}, 2, MATRIX)
    sent = [ranks.step([x, x])[0] for _ in range(2)]
    if alternating:  # the second step knows the column space, so it sends also what the first one left
        torch.testing.assert_close(sent[0] + sent[1], 2 * x, rtol=0, atol=1e-9)
    else:
        torch.testing.assert_close(sent[0], x, rtol=0, atol=1e-10)
    assert ranks.states[0].residual.norm() < 1e-9


@pytest.mark.parametrize("alternating", [False, True])
def test_powersgd_finds_rows_that_start_late(alternating: bool) -> None:
    """As rare tokens do. Directions of zeros, orthogonalized, would point at an embedding's first rows for ever."""
    ranks = Ranks.make({"name": "powersgd", "rank": 2, "alternating": alternating}, 1, ((40, 16),))
    grad = torch.zeros(40, 16, dtype=torch.float64)
    for _ in range(3):
        assert not ranks.step([grad.view(-1)])[0].any()
    grad[20:] = torch.randn(20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert share_lost(grad.view(-1), ranks.step([grad.view(-1)])[0]) < 0.95


@pytest.mark.parametrize("world_size", [2, 3, 7, 64, 1000])
def test_fp16_keeps_finite_means_finite(world_size: int) -> None:
    for value in (1e6, 65504.0, 65519.0, 65504.0 * (1 - 2**-11)):
        ranks = Ranks.make({"name": "fp16"}, world_size, ((2, 2),), torch.float32)
        mean = ranks.step([torch.tensor([value, -value, value, 1.0])] * world_size)[0]
        assert mean.isfinite().all()
        assert 65504 / (1 + world_size / 1024) * 0.99 <= mean[0] <= 65504
        assert mean[3] == pytest.approx(1, rel=2**-10)


@pytest.mark.parametrize(("name", "digits"), [("fp16", 11), ("bf16", 8)])
def test_half_precision_rounds_to_its_digits(name: str, digits: int) -> None:
    x = draw("gaussian")
    error = (one_step({"name": name}, x) - x).abs()
    assert (error <= x.abs() * 2.0**-digits + 2.0**-25).all()
    assert error.max() > 0
    # The residual makes up for it: after n steps the sum is right to one rounding, not n.
    ranks = Ranks.make({"name": name, "error_feedback": True}, 1, MATRIX)
    total = sum(ranks.step([x])[0] for _ in range(50))
    assert ((total - 50 * x).abs() <= 1.1 * (x.abs() * 2.0**-digits + 2.0**-25)).all()


# Thresholds.


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "student"])
@pytest.mark.parametrize("ratio", [0.003, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("error_feedback", [False, True])
def test_threshold_keeps_to_the_wanted_density(kind: str, ratio: float, error_feedback: bool) -> None:
    numel = 200_000
    ranks = Ranks.make({"name": "threshold", "ratio": ratio, "error_feedback": error_feedback}, 1, ((numel, 1),))
    achieved = [float((ranks.step([draw(kind, numel, seed)])[0] != 0).sum()) / (ratio * numel) for seed in range(12)]
    assert all(0.8 <= share <= 1.25 for share in achieved[4:]), achieved


def test_threshold_finds_its_way_from_far_off() -> None:
    ranks = Ranks.make({"name": "threshold", "ratio": 0.02, "error_feedback": False}, 1, ((50_000, 1),))
    for wrong in (1e-3, 1.0, 1.5, 3.0, 1e3):
        ranks.states[0].tensors["threshold"].tensor.fill_(wrong)
        for seed in range(8):
            sent = ranks.step([draw("laplace", 50_000, seed)])[0].count_nonzero()
        assert 800 <= sent <= 1250


@pytest.mark.parametrize("case", [{"name": "topk", "selection": "estimated"}, {"name": "threshold"}], ids=case_id)
def test_estimates_of_a_first_step(case: dict[str, Any]) -> None:
    for kind in ("gaussian", "laplace", "student"):
        for ratio in (0.001, 0.01, 0.3):
            sent = one_step({**case, "ratio": ratio}, draw(kind, 300_000, 5)).count_nonzero()
            assert 0.8 <= sent / (ratio * 300_000) <= 1.25
    spike = draw("spike", 5000)
    assert torch.equal(one_step({**case, "ratio": 0.01}, spike), spike)
    zeros = torch.zeros(5000, dtype=torch.float64)
    assert torch.equal(one_step({**case, "ratio": 0.01}, zeros), zeros)
    assert one_step({**case, "ratio": 0.01}, zeros + 1).sum() == math.ceil(1.25 * 50)  # what the payload has room for


# DGC.


def momentum_sgd(grads: list[torch.Tensor], momentum: float, nesterov: bool) -> list[torch.Tensor]:
    """What torch's SGD would subtract at learning rate 1."""
    parameter = torch.zeros_like(grads[0], requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=momentum, nesterov=nesterov)
    steps = []
    for grad in grads:
        before, parameter.grad = parameter.detach().clone(), grad.clone()
        optimizer.step()
        steps.append(before - parameter.detach())
    return steps


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("ratio", [0.05, 1.0])
def test_dgc_sends_the_momenta_and_nothing_else(nesterov: bool, ratio: float) -> None:
    case = {"name": "dgc", "ratio": ratio, "masking": False, "nesterov": nesterov, "momentum": 0.8}
    ranks = Ranks.make(case, 3)
    means = [step[0] for step in ranks.steps(6)]
    local = [momentum_sgd([gradient(s, rank, ranks.numel) for s in range(6)], 0.8, nesterov) for rank in range(3)]
    wanted = [torch.stack(parts).mean(0) for parts in zip(*local, strict=True)]
    velocity = torch.stack([state.velocity for state in ranks.states]).mean(0)
    torch.testing.assert_close(sum(means) + velocity, sum(wanted), rtol=0, atol=1e-12)
    if ratio == 1:
        for mean, step in zip(means, wanted, strict=True):
            torch.testing.assert_close(mean, step, rtol=0, atol=1e-12)


def test_dgc_forgets_the_momentum_of_what_was_sent() -> None:
    ranks = Ranks.make({"name": "dgc", "ratio": 0.1, "momentum": 0.5}, 1, MATRIX)
    x, y = draw("gaussian"), draw("gaussian", seed=1)
    sent = ranks.step([x])[0]
    (state,) = ranks.states
    assert torch.equal(state.momentum, torch.where(sent != 0, 0, x))
    assert torch.equal(state.velocity, torch.where(sent != 0, 0, x))
    again = ranks.step([y])[0]
    momentum = y + 0.5 * torch.where(sent != 0, 0, x)
    velocity = torch.where(sent != 0, 0, x) + momentum
    torch.testing.assert_close(again + state.velocity, velocity, rtol=0, atol=1e-14)
    torch.testing.assert_close(state.momentum, torch.where(again != 0, 0, momentum), rtol=0, atol=1e-14)


def test_dgc_clips_each_rank_to_its_share_of_the_norm() -> None:
    ranks = Ranks.make({"name": "dgc", "ratio": 1.0, "clip_norm": 2.0}, 4, MATRIX)
    large, small = draw("gaussian") * 1e3, draw("gaussian", seed=1) * 1e-3
    wanted = (large / large.norm() + small + 0 + 0) / 4  # a rank's norm is at most 2 / sqrt(4)
    zeros = torch.zeros(NUMEL, dtype=torch.float64)
    torch.testing.assert_close(ranks.step([large, small, zeros, zeros])[0], wanted, rtol=0, atol=1e-14)


def test_dgc_warms_up() -> None:
    compressor = compression.DGC(ratio=0.001, warmup_steps=8)
    steps = [compressor.ratio_at(step) for step in range(10)]
    assert steps == [0.25, 0.25, 0.0625, 0.0625, 0.015625, 0.015625, 0.004, 0.004, 0.001, 0.001]
    assert compression.DGC(ratio=0.1, warmup_steps=4).ratio_at(2) == 0.1
    assert compression.DGC().ratio_at(0) == 0.001
    ranks = Ranks.make({"name": "dgc", "ratio": 0.001, "warmup_steps": 2}, 2, ((20, 100),))
    assert [int(means[0].count_nonzero()) > 100 for means in ranks.steps(4)] == [True, False, False, False]


# Votes.


@pytest.mark.parametrize("exchange", ["all_gather", "two_stage"])
def test_a_byzantine_minority_turns_no_vote(exchange: str) -> None:
    honest = draw("gaussian")
    generator = torch.Generator().manual_seed(1)
    attacks = [-1e30 * honest, -honest, torch.randn(NUMEL, generator=generator, dtype=torch.float64)]
    ranks = Ranks.make({"name": "signsgd", "exchange": exchange}, 7, MATRIX)
    assert torch.equal(ranks.step([*attacks, *[honest] * 4])[0], honest.sign())


@pytest.mark.parametrize("world_size", [1, 2, 4, 5])
def test_the_vote_is_that_of_the_majority(world_size: int) -> None:
    grads = [draw("gaussian", seed=rank) for rank in range(world_size)]
    grads[-1][:128] = 0  # two blocks abstain
    signs = torch.stack([torch.where(grad < 0, -1.0, 1.0) for grad in grads]).double()
    signs[-1, :128] = 0
    wanted = (signs.sum(0) + 0.5 * (signs[0] if world_size > 1 else 0)).sign()  # rank 0 decides ties
    for exchange in ("all_gather", "two_stage"):
        ranks = Ranks.make({"name": "signsgd", "exchange": exchange, "block_size": 64}, world_size, MATRIX)
        assert torch.equal(ranks.step(grads)[0], wanted)


def test_if_the_first_rank_abstains_the_next_one_decides() -> None:
    ranks = Ranks.make({"name": "signsgd", "block_size": 64}, 3, MATRIX)
    x = draw("gaussian")
    assert torch.equal(ranks.step([0 * x, x, -x])[0], x.sign())
