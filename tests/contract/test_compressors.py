"""One contract for all registered compressors, virtual ranks in one process."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disttrain import compression
from disttrain.collectives import AllGather, AllToAll, sent_bytes
from disttrain.comm import Communicator, simulate
from disttrain.errors import UserError
from disttrain.reduction.exchange import Exchange, Executor, finish
from tests.support.compressing import CASES, SHAPES, Ranks, Shapes, case_id, gradient, make_bucket

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = [
    {"name": "dense"},
    {"name": "topk", "ratio": 1.0},
    {"name": "topk", "ratio": 1.0, "chunk_size": 64},
    {"name": "randomk", "ratio": 1.0},
    {"name": "randomk", "ratio": 1.0, "error_feedback": False, "scaled": True},
    {"name": "dgc", "ratio": 1.0},
]

# DGC keeps momenta, not gradients: it has a test of its own.
WITH_FEEDBACK = [
    case for case in CASES if getattr(compression.build(case), "error_feedback", case["name"] == "powersgd")
]

every_case = pytest.mark.parametrize("case", CASES, ids=case_id)


@every_case
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
def test_replicas_are_bit_identical(case: dict[str, Any], world_size: int) -> None:
    ranks = Ranks.make(case, world_size)
    for means in ranks.steps(1 if world_size == 64 else 4):
        assert all(torch.equal(mean, means[0]) for mean in means)
    firsts = list(ranks.states[0].slices(ranks.buckets[0].names))
    for state, bucket in zip(ranks.states, ranks.buckets, strict=True):
        for (parameter, name, view, replicated), (*_, first, _) in zip(state.slices(bucket.names), firsts, strict=True):
            assert not replicated or torch.equal(view, first), (parameter, name)


def same_on_all_ranks(step: int, rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """The same on all ranks, and not so small that half precision loses digits when it is divided."""
    own = gradient(step, 0, numel, dtype)
    return own + torch.where(own < 0, -0.5, 0.5)


@pytest.mark.parametrize("case", WITH_FEEDBACK, ids=case_id)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_is_sent_plus_what_is_pending_is_the_gradient(case: dict[str, Any], world_size: int) -> None:
    """Telescoping, on the mean over ranks: nothing is lost, however much a step leaves out."""
    num_steps = 7
    # A sum in half precision is rounded once more, which no rank's residual knows of; that of equal numbers is not.
    gradients = same_on_all_ranks if case["name"] in ("fp16", "bf16") else gradient
    ranks = Ranks.make(case, world_size)
    means = ranks.steps(num_steps, gradients)
    pending = torch.stack([state.residual for state in ranks.states]).mean(0)
    if "server_residual" in ranks.states[0].tensors:
        pending += torch.cat([state.server_residual for state in ranks.states])
    pairs = [(step, rank) for step in range(num_steps) for rank in range(world_size)]
    total = torch.stack([gradients(*pair, ranks.numel, torch.float64) for pair in pairs]).sum(0) / world_size
    sent = torch.stack([step[0] for step in means]).sum(0)
    torch.testing.assert_close(sent + pending, total, rtol=0, atol=1e-12)


def saved_tensors(ranks: Ranks) -> list[list[torch.Tensor]]:
    return [
        [view.clone() for *_, view, _ in state.slices(bucket.names)]
        for state, bucket in zip(ranks.states, ranks.buckets, strict=True)
    ]


@every_case
def test_a_program_changes_no_state_before_it_is_committed(case: dict[str, Any]) -> None:
    ranks = Ranks.make(case, 2)
    ranks.steps(3)
    before = saved_tensors(ranks)
    spoilt = gradient(9, 1, ranks.numel)
    spoilt[3], spoilt[600] = math.inf, math.nan
    ranks.step([gradient(9, 0, ranks.numel), spoilt], commit=False)
    for rank, tensors in enumerate(saved_tensors(ranks)):
        assert all(torch.equal(a, b) for a, b in zip(tensors, before[rank], strict=True))
        assert ranks.states[rank].step == 3
    # The step that was not committed leaves no trace in the next one either.
    untroubled = Ranks.make(case, 2)
    untroubled.steps(3)
    assert torch.equal(ranks.steps(1, first=3)[0][0], untroubled.steps(1, first=3)[0][0])


@every_case
@pytest.mark.parametrize("world_size", [1, 3])
def test_saved_and_restored_state_gives_the_same_next_steps(case: dict[str, Any], world_size: int) -> None:
    ranks, resumed = Ranks.make(case, world_size), Ranks.make(case, world_size)
    ranks.steps(3)
    for rank, tensors in enumerate(saved_tensors(ranks)):
        state, bucket = resumed.states[rank], resumed.buckets[rank]
        for (*_, view, _), saved in zip(state.slices(bucket.names), tensors, strict=True):
            view.copy_(saved)
        state.step = ranks.states[rank].step
    for means, again in zip(ranks.steps(2, first=3), resumed.steps(2, first=3), strict=True):
        assert torch.equal(means[0], again[0])


@every_case
def test_touches_no_global_random_generator(case: dict[str, Any]) -> None:
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()
    Ranks.make(case, 2).steps(2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert pickle.dumps(np.random.get_state()) == before[1]
    assert random.getstate() == before[2]


@every_case
def test_is_repeatable(case: dict[str, Any]) -> None:
    once, again = Ranks.make(case, 2).steps(4), Ranks.make(case, 2).steps(4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(once, again, strict=True))


@every_case
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_declares_the_number_of_rounds(case: dict[str, Any], world_size: int) -> None:
    for shapes in (SHAPES, ((2000, 300),)):  # in the larger one ``auto`` takes two stages
        ranks = Ranks.make(case, world_size, shapes, torch.float32)
        assert type(ranks.compressor).num_rounds is not compression.Compressor.num_rounds
        ranks.steps(2)
        declared = [ranks.compressor.num_rounds(bucket) for bucket in ranks.buckets]
        assert all([len(started) for started in step] == declared for step in ranks.started)


@pytest.mark.parametrize("case", EXACT, ids=case_id)
def test_exact_settings_give_the_mean(case: dict[str, Any]) -> None:
    ranks = Ranks.make(case, 4)
    mean = torch.stack([gradient(0, rank, ranks.numel) for rank in range(4)]).mean(0)
    torch.testing.assert_close(ranks.steps(1)[0][0], mean, rtol=0, atol=1e-14)


SPECIAL: dict[str, Callable[[int], torch.Tensor]] = {
    "zeros": torch.zeros,
    "all equal": torch.ones,
    "one spike": lambda numel: torch.nn.functional.one_hot(torch.tensor(numel // 2), numel),
    "denormal": lambda numel: torch.full((numel,), 1e-310, dtype=torch.float64),
    "huge": lambda numel: torch.linspace(-1e30, 1e30, numel, dtype=torch.float64),
}


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_inputs_give_finite_means(case: dict[str, Any], kind: str, dtype: torch.dtype) -> None:
    ranks = Ranks.make(case, 2, dtype=dtype)
    for mean, _ in ranks.steps(3, lambda step, rank, numel, dtype: SPECIAL[kind](numel).to(dtype)):
        assert mean.isfinite().all()
        assert mean.shape == (ranks.numel,)
        assert mean.dtype == dtype
        assert kind != "zeros" or not mean.any()
    assert all(tensor.isfinite().all() for state in ranks.states for tensor, *_ in state.tensors.values())


@pytest.mark.parametrize("name", compression.names())
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shapes=st.lists(st.one_of(st.just(()), st.tuples(st.integers(1, 70), st.integers(1, 9))), min_size=1, max_size=4),
    world_size=st.integers(1, 5),
    exponent=st.integers(-36, 36),
    zero_share=st.sampled_from([0.0, 0.9, 1.0]),
)
def test_any_sizes_and_scales_give_finite_replicas(
    name: str, shapes: list[tuple[int, ...]], world_size: int, exponent: int, zero_share: float
) -> None:
    def sparse(step: int, rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        kept = torch.rand(numel, generator=torch.Generator().manual_seed(rank)) >= zero_share
        return gradient(step, rank, numel, dtype) * 10.0**exponent * kept

    ranks = Ranks.make({"name": name}, world_size, tuple(shapes), torch.float32)
    for means in ranks.steps(2, sparse):
        assert all(mean.shape == (ranks.numel,) and torch.equal(mean, means[0]) for mean in means)
        assert means[0].isfinite().all()
        assert zero_share < 1 or not means[0].any()


@every_case
@pytest.mark.parametrize("shapes", [((1, 1),), ((),), ((1, 17),)], ids=str)
def test_tiny_buckets(case: dict[str, Any], shapes: Shapes) -> None:
    for world_size in (1, 3):
        ranks = Ranks.make(case, world_size, shapes)
        for means in ranks.steps(3):
            assert means[0].isfinite().all()
            assert all(torch.equal(mean, means[0]) for mean in means)


@every_case
def test_learns_again_after_steps_without_any_gradient(case: dict[str, Any]) -> None:
    def late_start(step: int, rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(numel, dtype=dtype) if step < 3 else gradient(0, 0, numel, dtype)

    means = [step[0] for step in Ranks.make(case, 2).steps(12, late_start)]
    wanted = gradient(0, 0, means[0].numel())
    assert torch.nn.functional.cosine_similarity(torch.stack(means[3:]).sum(0), wanted, dim=0) > 0.3


@pytest.mark.parametrize("case", WITH_FEEDBACK, ids=case_id)
def test_a_rank_without_gradients_has_no_residual(case: dict[str, Any]) -> None:
    """Its residual is of its own gradients alone, never of what came back from the others."""

    def from_rank_0(step: int, rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return gradient(step, rank, numel, dtype) if rank == 0 else torch.zeros(numel, dtype=dtype)

    ranks = Ranks.make(case, 2)
    ranks.steps(4, from_rank_0)
    assert ranks.states[0].residual.any() or case in EXACT
    assert not ranks.states[1].residual.any()


@every_case
def test_bytes_do_not_depend_on_values(case: dict[str, Any]) -> None:
    def sizes(gradients: Callable[..., torch.Tensor]) -> list[list[int]]:
        ranks = Ranks.make(case, 3, dtype=torch.float32)
        ranks.steps(4, gradients)
        everything = [(item, rank) for step in ranks.started for rank, items in enumerate(step) for item in items]
        # No size depends on values, so none has to be exchanged.
        assert all(item.same_size for item, _ in everything if isinstance(item, AllGather | AllToAll))
        return [
            [sent_bytes(item, 3, rank) for rank, items in enumerate(step) for item in items] for step in ranks.started
        ]

    usual = sizes(gradient)
    assert sum(map(sum, usual)) > 0
    assert sizes(lambda step, rank, numel, dtype: torch.zeros(numel, dtype=dtype)) == usual
    assert sizes(lambda step, rank, numel, dtype: gradient(step, rank, numel, dtype) ** 3 * 10.0**step) == usual


NUMEL = sum(math.prod(shape) for shape in SHAPES)
ROOM = math.ceil(1.25 * round(0.1 * NUMEL))
KEPT = NUMEL // 64 * 6 + round(0.1 * (NUMEL % 64))  # of chunks of 64: 6 of each, and of the shorter one
MATRICES = ((16, 40), (40, 1), (8, 27), (1, 1), (64, 1), (5, 7))


def padded(num_bytes: int) -> int:
    """Each section of a payload ends at a multiple of 16 bytes."""
    return 16 * math.ceil(num_bytes / 16)


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ({"name": "dense"}, 4 * NUMEL),
        ({"name": "fp16"}, 2 * NUMEL),
        ({"name": "bf16"}, 2 * NUMEL),
        ({"name": "topk", "ratio": 0.1}, 2 * padded(4 * round(0.1 * NUMEL))),
        ({"name": "topk", "ratio": 0.1, "selection": "estimated"}, 2 * padded(4 * ROOM)),
        ({"name": "topk", "ratio": 0.1, "chunk_size": 64}, padded(4 * KEPT) + padded(3 * math.ceil(KEPT / 2))),
        *(
            (
                {"name": "topk", "ratio": 0.1, "chunk_size": 64, "value_bits": bits},
                padded(math.ceil(bits / 8 * KEPT))
                + (padded(2 * 4 * math.ceil(NUMEL / 64)) if bits <= 8 else 0)
                + padded(3 * math.ceil(KEPT / 2)),
            )
            for bits in (2, 4, 8, 16)
        ),
        ({"name": "threshold", "ratio": 0.1}, 2 * padded(4 * ROOM)),
        ({"name": "randomk", "ratio": 0.1}, 4 * round(0.1 * NUMEL)),
        ({"name": "dgc", "ratio": 0.1}, 2 * padded(4 * round(0.1 * NUMEL))),
        ({"name": "dgc", "ratio": 0.1, "warmup_steps": 8}, 2 * padded(4 * round(0.25 * NUMEL))),
        ({"name": "qsgd", "bits": 4, "block_size": 64}, (blocks := math.ceil(NUMEL / 64)) * 32 + padded(4 * blocks)),
        ({"name": "terngrad", "block_size": 64}, blocks * 16 + padded(4 * blocks)),
        ({"name": "natural", "block_size": 64}, blocks * 64 + padded(4 * blocks)),
        ({"name": "efsign", "block_size": 64}, padded(blocks * 8) + padded(4 * blocks)),
        ({"name": "efsign", "bits": 2, "block_size": 64}, padded(blocks * 16) + padded(2 * 4 * blocks)),
        ({"name": "signsgd", "block_size": 64}, padded(blocks * 8) + padded(blocks)),
        ({"name": "onebit"}, 4096 // 8 + padded(4 * 2 * sum(rows for rows, _ in MATRICES))),
        ({"name": "powersgd", "rank": 2}, 4 * sum(min(2, n, m) * (n + m) for n, m in MATRICES)),
        ({"name": "powersgd", "rank": 2, "alternating": True}, 4 * sum(min(2, n, m) * n for n, m in MATRICES)),
    ],
    ids=lambda value: case_id(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_payload_is_the_formula_to_the_byte(case: dict[str, Any], wanted: int) -> None:
    def run(comm: Communicator) -> int:
        compressor = compression.build(case)
        bucket = make_bucket(comm.rank, comm.world_size, dtype=torch.float32)
        executor = Executor(comm)
        ledger = executor.ledger
        grad = gradient(0, comm.rank, bucket.numel, torch.float32)
        list(finish([Exchange(compressor.reduce(grad, bucket, compressor.init_state(bucket)), executor)]))
        ledger.end_step(bucket.numel)
        assert ledger.total.dense_bytes == 4 * bucket.numel
        factor = 2 / 3 if case["name"] in ("dense", "fp16", "bf16", "randomk", "powersgd") else 1
        assert ledger.total.received_bytes == pytest.approx(2 * factor * ledger.total.sent_bytes, abs=2)
        return ledger.total.sent_bytes

    assert simulate(3, run) == [wanted] * 3


def test_build_takes_instances_names_and_mappings() -> None:
    assert compression.build("topk") == compression.TopK()
    assert compression.build({"name": "topk", "ratio": 0.5}) == compression.TopK(ratio=0.5)
    instance = compression.PowerSGD(rank=2)
    assert compression.build(instance) is instance


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("topkk", "did you mean 'topk'"),
        ({"name": "topk", "ration": 0.1}, "did you mean 'compressor.ratio'"),
        ({"name": "topk", "ratio": 2.0}, "ratio"),
        ({"name": "topk", "chunk_size": 100}, "chunk_size"),
        ({"name": "topk", "value_bits": 4}, "needs a chunk_size"),
        ({"name": "topk", "chunk_size": 64, "value_bits": 3}, "value_bits"),
        ({"name": "topk", "chunk_size": 64, "selection": "estimated"}, "needs selection=exact"),
        ({"name": "powersgd", "rank": 0}, "rank"),
        ({"name": "qsgd", "bits": 9}, "bits"),
        ({"name": "efsign", "bits": 3}, "bits"),
        ({"name": "randomk", "scaled": True}, "error_feedback=false"),
        ({"name": "signsgd", "error_feedback": True}, "error_feedback"),
        ({"name": "onebit", "exchange": "two_stage"}, "cannot be exchanged in two stages"),
        ({"name": "threshold", "exchange": "two_stage"}, "cannot be exchanged in two stages"),
        ({"name": "threshold", "mean_bits": 4}, "mean_bits needs two stages"),
        ({"name": "efsign", "exchange": "all_gather", "mean_bits": 4}, "mean_bits needs two stages"),
        ({"name": "efsign", "mean_bits": 5}, "mean_bits"),
        ({"name": "signsgd", "mean_bits": 2}, "mean_bits"),
        ({"name": "dgc", "momentum": 1.0}, "momentum"),
        ({"name": "terngrad", "clip": 0.0}, "clip"),
        ({"ratio": 0.1}, "name"),
    ],
)
def test_build_says_what_is_wrong(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compression.build(spec)
