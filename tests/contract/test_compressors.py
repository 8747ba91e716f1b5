"""One contract for all registered compressors, virtual ranks in one process."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from disttrain import compression
from disttrain.collectives import AllGather, AllToAll, Collective, sent_bytes
from disttrain.comm import Communicator, simulate
from disttrain.compression import Bucket, Compressor, State
from disttrain.errors import UserError
from disttrain.reduction.exchange import Exchange, finish
from disttrain.reduction.ledger import Ledger

SHAPES = ((16, 40), (40,), (8, 3, 3, 3), (), (64, 1), (5, 7))
# The options with which each compressor is put through the contract; one that is new is tested with its defaults.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "topk": [
        {"ratio": 0.05},
        {"ratio": 1.0},
        {"ratio": 0.2, "error_feedback": False},
        {"ratio": 0.1, "exchange": "two_stage"},
    ],
    "qsgd": [
        {"bits": 2, "block_size": 64},
        {"bits": 4},
        {"bits": 7, "error_feedback": True},
        {"exchange": "two_stage"},
    ],
    "efsign": [{}, {"exchange": "two_stage", "block_size": 64}],
    "blockwise8": [{}, {"exchange": "two_stage", "block_size": 64}],
    "powersgd": [{"rank": 1}, {"rank": 4}],
}
CASES = [{"name": name, **options} for name in compression.names() for options in OPTIONS.get(name, [{}])]
EXACT = [{"name": "dense"}, {"name": "topk", "ratio": 1.0}]


def case_id(case: dict[str, Any]) -> str:
    return ",".join(str(value) if key == "name" else f"{key}={value}" for key, value in case.items())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Virtual ranks are threads already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


every_case = pytest.mark.parametrize("case", CASES, ids=case_id)


def make_bucket(
    comm_rank: int, world_size: int, shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.float64
) -> Bucket:
    names = tuple(f"layer{index}.weight" for index in range(len(shapes)))
    return Bucket(names, shapes, dtype, torch.device("cpu"), comm_rank, world_size)


def gradient(step: int, rank: int, numel: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(numel, generator=generator, dtype=dtype)


class Recorder(Ledger):
    """A ledger that remembers what was started."""

    def __init__(self, comm: Communicator) -> None:
        super().__init__(comm)
        self.started: list[Collective] = []

    def start(self, collective: Collective, *, priority: bool = False) -> Any:
        self.started.append(collective)
        return super().start(collective, priority=priority)


def exchange(
    compressor: Compressor, bucket: Bucket, state: State, comm: Communicator, grad: torch.Tensor
) -> tuple[torch.Tensor, list[Collective]]:
    """One committed step: the mean, and the collectives it took."""
    ledger = Recorder(comm)
    ((_, (mean, new_state)),) = finish([Exchange(compressor.reduce(grad.clone(), bucket, state), ledger)])
    mean = mean.clone()
    state.commit(new_state)
    return mean, ledger.started


def run_steps(
    case: dict[str, Any],
    world_size: int,
    num_steps: int = 4,
    gradients: Callable[..., torch.Tensor] = gradient,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    dtype: torch.dtype = torch.float64,
) -> list[tuple[list[torch.Tensor], State, Bucket]]:
    """Per rank: the means of all steps and the state at the end."""

    def run(comm: Communicator) -> tuple[list[torch.Tensor], State, Bucket]:
        compressor = compression.build(case)
        bucket = make_bucket(comm.rank, comm.world_size, shapes, dtype)
        state = compressor.init_state(bucket)
        means = [
            exchange(compressor, bucket, state, comm, gradients(step, comm.rank, bucket.numel, dtype))[0]
            for step in range(num_steps)
        ]
        return means, state, bucket

    return simulate(world_size, run)


@every_case
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
def test_replicas_are_bit_identical(case: dict[str, Any], world_size: int) -> None:
    results = run_steps(case, world_size, num_steps=2 if world_size == 64 else 4)
    first_means, first_state, bucket = results[0]
    for means, state, _ in results:
        assert all(torch.equal(mean, first) for mean, first in zip(means, first_means, strict=True))
        for (parameter, name, view, replicated), (*_, first, _) in zip(
            state.slices(bucket.names), first_state.slices(bucket.names), strict=True
        ):
            assert not replicated or torch.equal(view, first), (parameter, name)


@every_case
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_is_sent_plus_the_residual_is_the_gradient(case: dict[str, Any], world_size: int) -> None:
    """Telescoping, on the mean over ranks: nothing is lost, however much a step leaves out."""
    num_steps = 7
    results = run_steps(case, world_size, num_steps)
    if "residual" not in results[0][1].tensors:
        assert not getattr(compression.build(case), "error_feedback", False)
        pytest.skip("keeps no residual")
    sent = torch.stack(results[0][0]).sum(0)
    residual = torch.stack([state.residual for _, state, _ in results]).mean(0)
    if "server_residual" in results[0][1].tensors:
        residual += torch.cat([state.server_residual for _, state, _ in results])
    total = torch.stack(
        [gradient(step, rank, sent.numel()) for step in range(num_steps) for rank in range(world_size)]
    ).sum(0)
    torch.testing.assert_close(sent + residual, total / world_size, rtol=0, atol=1e-12)


@every_case
def test_a_program_changes_no_state_before_it_is_committed(case: dict[str, Any]) -> None:
    def run(comm: Communicator) -> None:
        compressor = compression.build(case)
        bucket = make_bucket(comm.rank, comm.world_size)
        state = compressor.init_state(bucket)
        for step in range(3):
            exchange(compressor, bucket, state, comm, gradient(step, comm.rank, bucket.numel))
        before = {key: (parameter, view.clone()) for parameter, key, view, _ in state.slices(bucket.names)}
        spoilt = gradient(9, comm.rank, bucket.numel)
        if comm.rank == 1:
            spoilt[3], spoilt[600] = math.inf, math.nan
        list(finish([Exchange(compressor.reduce(spoilt, bucket, state), Ledger(comm))]))
        after = {key: (parameter, view) for parameter, key, view, _ in state.slices(bucket.names)}
        assert all(torch.equal(before[key][1], after[key][1]) for key in before)
        assert state.step == 3

    simulate(2, run)


@every_case
def test_touches_no_global_random_generator(case: dict[str, Any]) -> None:
    torch_state, numpy_state, python_state = (
        torch.get_rng_state(),
        pickle.dumps(np.random.get_state()),
        random.getstate(),
    )
    run_steps(case, 1, num_steps=2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert pickle.dumps(np.random.get_state()) == numpy_state
    assert random.getstate() == python_state


@every_case
def test_is_repeatable(case: dict[str, Any]) -> None:
    once, again = run_steps(case, 2), run_steps(case, 2)
    assert all(torch.equal(a, b) for a, b in zip(once[0][0], again[0][0], strict=True))


@pytest.mark.parametrize("case", EXACT, ids=case_id)
def test_exact_settings_give_the_mean(case: dict[str, Any]) -> None:
    results = run_steps(case, 4, num_steps=1)
    mean = torch.stack([gradient(0, rank, results[0][2].numel) for rank in range(4)]).mean(0)
    torch.testing.assert_close(results[0][0][0], mean, rtol=0, atol=1e-14)


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
    def special(step: int, rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return SPECIAL[kind](numel).to(dtype)

    means, state, bucket = run_steps(case, 2, 3, special, dtype=dtype)[0]
    for mean in means:
        assert mean.isfinite().all()
        assert mean.shape == (bucket.numel,)
        assert mean.dtype == dtype
        assert kind != "zeros" or not mean.any()
    assert all(tensor.isfinite().all() for tensor, _, _ in state.tensors.values())


@every_case
def test_learns_again_after_steps_without_any_gradient(case: dict[str, Any]) -> None:
    def late_start(step: int, rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(numel, dtype=dtype) if step < 3 else gradient(0, 0, numel, dtype)

    means, _, _ = run_steps(case, 2, 12, late_start)[0]
    wanted = gradient(0, 0, means[0].numel())
    assert torch.nn.functional.cosine_similarity(torch.stack(means[3:]).sum(0), wanted, dim=0) > 0.3


@every_case
def test_bytes_are_those_of_the_tensors_and_do_not_depend_on_their_values(case: dict[str, Any]) -> None:
    def run(comm: Communicator) -> None:
        compressor = compression.build(case)
        bucket = make_bucket(comm.rank, comm.world_size, dtype=torch.float32)
        state = compressor.init_state(bucket)
        sizes = []
        for step in range(3):
            grad = gradient(step, comm.rank, bucket.numel, torch.float32) * 10.0**step
            _, started = exchange(compressor, bucket, state, comm, grad)
            sizes.append([sent_bytes(item, comm.world_size, comm.rank) for item in started])
            # No size depends on values, so none has to be exchanged.
            assert all(item.same_size for item in started if isinstance(item, AllGather | AllToAll))
        assert sizes[0] == sizes[1] == sizes[2]

    simulate(3, run)


def numel_of_shapes() -> int:
    return sum(math.prod(shape) for shape in SHAPES)


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ({"name": "dense"}, 4 * numel_of_shapes()),
        # values and indices, each section padded to 16 bytes
        ({"name": "topk", "ratio": 0.1}, 2 * 16 * math.ceil(4 * round(0.1 * numel_of_shapes()) / 16)),
        (
            {"name": "qsgd", "bits": 4, "block_size": 64},
            (blocks := math.ceil(numel_of_shapes() / 64)) * 32 + 16 * math.ceil(4 * blocks / 16),
        ),
        (
            {"name": "powersgd", "rank": 2},
            4 * sum(min(2, n, m) * (n + m) for n, m in ((16, 40), (40, 1), (8, 27), (1, 1), (64, 1), (5, 7))),
        ),
    ],
    ids=lambda value: case_id(value) if isinstance(value, dict) else "",
)
def test_payload_is_the_formula_to_the_byte(case: dict[str, Any], wanted: int) -> None:
    def run(comm: Communicator) -> int:
        compressor = compression.build(case)
        bucket = make_bucket(comm.rank, comm.world_size, dtype=torch.float32)
        ledger = Ledger(comm)
        grad = gradient(0, comm.rank, bucket.numel, torch.float32)
        list(finish([Exchange(compressor.reduce(grad, bucket, compressor.init_state(bucket)), ledger)]))
        ledger.end_step(bucket.numel)
        assert ledger.total.dense_bytes == 4 * bucket.numel
        factor = 2 / 3 if case["name"] in ("dense", "powersgd") else 1
        assert ledger.total.received_bytes == pytest.approx(2 * factor * ledger.total.sent_bytes, abs=2)
        return ledger.total.sent_bytes

    assert simulate(3, run) == [wanted] * 3


def test_topk_is_a_contraction() -> None:
    bucket = make_bucket(0, 1)
    for ratio in (0.01, 0.1, 0.5):
        compressor = compression.TopK(ratio=ratio)
        x = gradient(1, 0, bucket.numel)
        residual = x.clone()
        compressor.encode(residual, bucket, compressor.init_state(bucket))
        k = round(ratio * bucket.numel)
        assert residual.norm() ** 2 <= (1 - k / bucket.numel) * x.norm() ** 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_qsgd_is_unbiased_within_its_variance_bound(bits: int) -> None:
    compressor = compression.QSGD(bits=bits, block_size=64)
    bucket = make_bucket(0, 1, ((16, 64),))
    x = gradient(0, 0, bucket.numel)
    state = compressor.init_state(bucket)
    draws = []
    for step in range(2000):
        state.step = step
        out = torch.zeros_like(x)
        compressor.decode_add(compressor.encode(x.clone(), bucket, state), out, bucket)
        draws.append(out)
    samples = torch.stack(draws)
    error = samples - x
    levels = 2 ** (bits - 1) - 1
    omega = min(64 / levels**2, math.sqrt(64) / levels)
    assert error.square().sum(1).mean() <= omega * x.norm() ** 2
    # Bernstein's bound on each of the means, with the true variance: a right program fails with a chance below 1e-6.
    unit = (x.view(16, 64).norm(dim=1, keepdim=True) / levels).expand(16, 64).reshape(-1)
    share = (x.abs() / unit).frac()
    log = math.log(2 * x.numel() / 1e-6)
    bound = unit * ((2 * share * (1 - share) * log / len(draws)).sqrt() + 2 * log / (3 * len(draws)))
    assert (error.mean(0).abs() <= bound).all()


def test_qsgd_rounds_independently_on_every_rank() -> None:
    def same(step: int, rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return gradient(step, 0, numel, dtype)

    def error(world_size: int) -> float:
        mean = run_steps({"name": "qsgd", "bits": 2}, world_size, 1, same)[0][0][0]
        return float((mean - gradient(0, 0, mean.numel())).norm())

    assert error(16) < 0.5 * error(1)


def test_powersgd_on_many_ranks_is_powersgd_on_their_mean() -> None:
    def mean_of_four(step: int, rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.stack([gradient(step, other, numel, dtype) for other in range(4)]).mean(0)

    many = run_steps({"name": "powersgd", "rank": 2}, 4)[0][0]
    one = run_steps({"name": "powersgd", "rank": 2}, 1, gradients=mean_of_four)[0][0]
    for a, b in zip(many, one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_powersgd_recovers_what_has_its_rank() -> None:
    def low_rank(step: int, rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        factors = [torch.randn(size, generator=generator, dtype=dtype) for size in ((16, 2), (2, 40))]
        return (factors[0] @ factors[1]).view(-1)

    means, state, _ = run_steps({"name": "powersgd", "rank": 2}, 2, 1, low_rank, ((16, 40),))[0]
    torch.testing.assert_close(means[0], low_rank(0, 0, 640, torch.float64), rtol=0, atol=1e-10)
    assert state.residual.norm() < 1e-9


def test_powersgd_converges_to_the_best_approximation() -> None:
    fixed = gradient(0, 0, 640).view(16, 40)
    u, s, v = torch.linalg.svd(fixed, full_matrices=False)
    best = (u[:, :3] * s[:3]) @ v[:3]
    compressor = compression.PowerSGD(rank=3)
    bucket = make_bucket(0, 1, ((16, 40),))
    state = compressor.init_state(bucket)

    def run(comm: Communicator) -> torch.Tensor:
        for _ in range(800):
            mean, _ = exchange(compressor, bucket, state, comm, fixed.view(-1))
            state.residual.zero_()
        return mean

    torch.testing.assert_close(simulate(1, run)[0].view(16, 40), best, rtol=0, atol=1e-6)


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
        ({"name": "powersgd", "rank": 0}, "rank"),
        ({"name": "qsgd", "bits": 9}, "bits"),
        ({"ratio": 0.1}, "name"),
    ],
)
def test_build_says_what_is_wrong(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compression.build(spec)
