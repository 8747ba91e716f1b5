"""The batch sizes that each policy chooses, and how a batch is split into passes."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch

import disttrain
from disttrain.batching import BatchPolicy, GradientNoise, GrowingBatch, PolicyInputs, registry
from disttrain.comm import Communicator, SingleProcess, simulate
from disttrain.errors import UserError
from disttrain.reduction import SquaredNorms


def noise_of(square_norm: float, trace: float, num_measured: int = 30) -> GradientNoise:
    noise = GradientNoise()
    for _ in range(num_measured):
        noise.update(SquaredNorms(square_norm + trace / 32, square_norm + trace / 64), [32, 32], 64)
    return noise


def target(policy: BatchPolicy, **changes: Any) -> float:
    usual = {
        "batch_size": 64,
        "initial_size": 16,
        "step": 100,
        "epochs": 2.5,
        "epoch_losses": None,
        "noise": noise_of(1.0, 300.0),
        "is_measured": True,
    }
    return policy.target_size(PolicyInputs(**{**usual, **changes}))


def test_a_schedule_multiplies_at_its_milestones() -> None:
    policy = registry.build({"name": "schedule", "milestones": [1, 2.5], "factor": 3, "max_batch_size": 100})
    assert [target(policy, epochs=epochs) for epochs in (0.99, 1, 2.49, 2.5, 9)] == [16, 48, 48, 144, 144]
    assert policy.lr_factor(144, 100) == pytest.approx(100 / 144), "the learning rate falls where the batch cannot grow"
    by_step = registry.build({"name": "schedule", "milestones": [100], "unit": "step", "max_batch_size": 99})
    assert [target(by_step, step=step) for step in (99, 100)] == [16, 32]


def test_plateau_doubles_the_batch_if_the_loss_does_not_fall_by_a_factor() -> None:
    policy = registry.build({"name": "plateau", "factor": 0.9, "max_batch_size": 256})
    cases = {None: 64, (0.89, 1.0): 64, (0.91, 1.0): 128, (2.0, 1.0): 128}
    assert {losses: target(policy, epoch_losses=losses) for losses in cases} == cases


def test_the_batch_grows_up_to_the_noise_scale() -> None:
    policy = registry.build({"name": "noise_scale", "max_batch_size": 1024})
    sizes = [target(policy, batch_size=size) for size in (64, 128, 149, 150, 151, 1024)]
    assert sizes == [128, 256, 298, 300, 151, 1024]
    assert target(policy, noise=noise_of(1.0, 300.0, num_measured=19)) == 64, "too few measurements"
    assert target(policy, is_measured=False) == 64
    assert target(policy, noise=noise_of(0.0, 300.0)) == 128, "one factor at a time"
    half = registry.build({"name": "noise_scale", "max_batch_size": 1024, "share": 0.4})
    assert target(half) == 64


def test_the_norm_test_grows_the_batch_until_it_passes() -> None:
    policy = registry.build({"name": "norm_test", "theta": 0.5, "max_batch_size": 4096})
    wanted = 300 / (0.25 * (1 + 300 / 64))
    assert target(policy) == pytest.approx(wanted)
    size = 64.0
    for _ in range(60):
        size = target(policy, batch_size=size)
    assert 300 / size == pytest.approx(0.25 * (1 + 300 / size)), "the noise is theta times the norm"
    assert target(policy, batch_size=1000) == 1000, "it passes already"
    assert target(policy, noise=noise_of(1.0, 0.0)) == 64


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "largest", "world_size", "expected"),
    [
        (64, 1, None, 4, 1),
        (64, 2, None, 4, 2),
        (64, 1, 8, 4, 2),
        (64, 1, 8, 1, 8),
        (96, 1, 10, 4, 3),
        (96, 1, 7, 4, 4),
        (100, 1, 10, 4, 5),  # three suffice, five split evenly
        (101, 1, 10, 4, 3),  # nothing splits evenly: parts differ by a sample
        (4, 4, 1, 1, 4),
    ],
)
def test_a_batch_is_split_into_the_fewest_even_passes(
    batch_size: int, accumulation: int, largest: int | None, world_size: int, expected: int
) -> None:
    policy = registry.build({"name": "fixed", "max_micro_batch": largest})

    def passes(comm: Communicator) -> int:
        return GrowingBatch(policy, comm, batch_size, 1000, accumulation).accumulation

    assert simulate(world_size, passes) == [expected] * world_size


SPEC = {"name": "noise_scale", "max_batch_size": 100, "min_measurements": 1, "smoothing": 0.0}


@pytest.mark.parametrize(
    ("lr_scaling", "gain"),
    [("none", 1), ("linear", 100 / 16), ("sqrt", 2.5), ("adascale", (1 + 900 / 16) / (1 + 900 / 100))],
)
def test_the_learning_rate_follows_the_batch_which_stays_within_its_limit(lr_scaling: str, gain: float) -> None:
    growing = GrowingBatch(registry.build({**SPEC, "lr_scaling": lr_scaling}), SingleProcess(), 16, 1000, 2)
    norms = SquaredNorms(0.25 + 900 * 8 / 16**2, 1 + 900 / 16)  # of a first pass of 8 in 16
    sizes = []
    for step in range(1, 6):
        growing.update(torch.tensor(1.0), 16, sizes=[8], norms=norms, step=step, epochs=0.1)
        sizes.append(growing.batch_size)
    assert sizes == [32, 64, 100, 100, 100]
    assert growing.gain == pytest.approx(gain)
    assert growing.metrics["noise_scale"] == pytest.approx(900)
    assert growing.scale_invariant_steps >= 5


def test_a_batch_does_not_outgrow_the_data() -> None:
    growing = GrowingBatch(registry.build(SPEC), SingleProcess(), 16, 40, 2)
    for step in range(5):
        norms = SquaredNorms(0.25 + 900 * 8 / 16**2, 1 + 900 / 16)
        growing.update(torch.tensor(1.0), 16, sizes=[8], norms=norms, step=step, epochs=0.1)
    assert growing.batch_size == 40


def test_skipped_steps_are_not_recorded() -> None:
    growing = GrowingBatch(registry.build({"name": "plateau", "max_batch_size": 64}), SingleProcess(), 16, 1000)
    for step, loss in enumerate([1.0, math.inf, 3.0]):
        bad = math.isinf(loss)
        growing.update(
            torch.tensor(loss), 16, sizes=[16], norms=None, step=step, epochs=0, ends_epoch=step == 2, is_skipped=bad
        )
    assert growing.state_dict()["last_loss"] == 2.0
    assert growing.scale_invariant_steps == 2


def test_adascale_has_its_gain_over_the_base_batch() -> None:
    policy = registry.build({"name": "adascale", "base_batch_size": 16, "smoothing": 0.0})
    growing = GrowingBatch(policy, SingleProcess(), 64, 1000, 2)
    growing.update(
        torch.tensor(1.0), 64, sizes=[32], norms=SquaredNorms(0.25 + 32 * 640 / 64**2, 11.0), step=1, epochs=0.1
    )
    assert growing.batch_size == 64
    assert growing.gain == pytest.approx((1 + 640 / 16) / (1 + 640 / 64))
    assert growing.scale_invariant_steps == 1, "nothing was measured before the first step"
    growing.update(torch.tensor(1.0), 64, sizes=[32], norms=None, step=2, epochs=0.2)
    assert growing.scale_invariant_steps == pytest.approx(1 + growing.gain)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"name": "plateau", "max_batch_size": 8},
            "batch.max_batch_size=8 is below batch_size=16, which the run starts with",
        ),
        ({"name": "adascale", "base_batch_size": 32}, "batch.base_batch_size=32 is above batch_size=16"),
        (
            {"name": "schedule", "max_batch_size": 64, "milestones": [3, 10]},
            "ends at epochs=10, so 10 is never reached",
        ),
        ({"name": "schedule", "max_batch_size": 64, "milestones": [3, 2]}, "batch.milestones=.* in increasing order"),
        ({"name": "schedule", "max_batch_size": 64, "milestones": []}, "batch.milestones"),
        ({"name": "plateau"}, "missing key 'batch.max_batch_size'"),
        ({"name": "plateu"}, "did you mean 'plateau'"),
        ({"name": "norm_test", "max_batch_size": 64, "theta": 1.5}, "batch.theta"),
        ({"name": "adascale", "base_batch_size": 4, "lr_scaling": "sqrt"}, "batch.lr_scaling"),
        ({"name": "fixed", "max_micro_batch": 0}, "batch.max_micro_batch"),
        ({"name": "fixed", "max_micro_batch": "car"}, "batch.max_micro_batch"),
        ({"name": "fixed", "memory_gib": 2}, "batch.memory_gib needs batch.max_micro_batch=auto"),
    ],
)
def test_policies_that_do_not_fit_are_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.build(spec).check(16, 10, None)


def test_noise_needs_two_parts() -> None:
    with pytest.raises(UserError, match="start 2 or more workers, or set accumulation=2"):
        GrowingBatch(registry.build(SPEC), SingleProcess(), 16, 1000)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_in_a_users_own_loop(world_size: int) -> None:
    """A gradient of known noise: the batch grows to its noise scale and no further, whatever the number of ranks."""
    scale = 100.0  # trace 100 over a squared norm of 1

    def run(comm: Communicator) -> tuple[list[int], float]:
        weight = torch.nn.Parameter(torch.zeros(400, 1))
        model = torch.nn.ParameterList([weight])
        passes = 2 if world_size == 1 else 1
        growing = disttrain.GrowingBatch(
            {"name": "noise_scale", "max_batch_size": 4096, "lr_scaling": "sqrt", "smoothing": 0.98},
            comm,
            batch_size=8,
            num_samples=100000,
            accumulation=passes,
        )
        optimizer = disttrain.DistributedOptimizer(
            torch.optim.SGD([weight], lr=0.1), model, comm=comm, norms_every=growing.norms_every
        )
        generator = torch.Generator().manual_seed(comm.rank)
        sizes = []
        for step in range(400):
            optimizer.zero_grad()
            for index in range(passes):
                own = growing.batch_size // world_size // passes
                noise = torch.randn(own, 400, generator=generator).mean(0) * (scale / 400) ** 0.5
                loss = (weight.view(-1) * (noise + 0.05)).sum() / passes
                with optimizer.no_sync() if index < passes - 1 else contextlib.nullcontext():
                    loss.backward()
                    if index < passes - 1:
                        optimizer.measure_first_pass()
            optimizer.step()
            growing.update(loss, growing.batch_size, norms=optimizer.norms, step=step, epochs=0.0)
            sizes.append(growing.batch_size)
        return sizes, growing.gain

    for sizes, gain in simulate(world_size, run):
        assert sizes == sorted(sizes)
        assert sizes[-1] == 64
        assert gain == pytest.approx(8**0.5)


def test_deprecated_names_still_work() -> None:
    growing = GrowingBatch(registry.build({"name": "plateau", "max_batch_size": 64}), SingleProcess(), 16, 1000)
    with pytest.warns(DeprecationWarning, match="use is_skipped"):
        growing.update(torch.tensor(1.0), 16, step=1, epochs=0.1, is_sound=False)
    assert growing.scale_invariant_steps == 0
    with pytest.warns(DeprecationWarning, match="use resume"):
        growing.go_on(1, 0.1)
    assert growing.batch_size == 16
