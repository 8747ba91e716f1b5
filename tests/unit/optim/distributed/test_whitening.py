"""Whitened compression under optimizers with a second moment. Gradients are given, so that expectations are known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer, UserError
from disttrain.comm import Communicator, simulate
from disttrain.optim.distributed.loss_scale import LossScale
from disttrain.optim.optimizers.lamb import LAMB
from tests.support.compressing import CASES, case_id

pytestmark = pytest.mark.usefixtures("one_thread")

# Without a guard, since a second moment of four squares leaves its band.
WHITEN = {"warmup_steps": 4, "refresh_growth": 0.25, "max_interval": 4, "band": 1e9}
EFSIGN: dict[str, Any] = {"name": "efsign", "block_size": 64, "min_numel": 1, "whiten": WHITEN}
GUARDED = {**EFSIGN, "whiten": {"warmup_steps": 20, "refresh_growth": 0.1, "max_interval": 8}}
EXACT: dict[str, Any] = {"name": "topk", "ratio": 1.0, "min_numel": 1, "whiten": WHITEN}
KINDS = "DDDDDDDD.D.D..D..D...D...D...D...D...D.."  # steps with these settings, D: dense

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, betas=(0.9, 0.95)),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "LAMB": lambda parameters: LAMB(parameters, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
}
SECOND_MOMENTS = {"RMSprop": "square_avg", "Adagrad": "sum"}


class Given(nn.Module):
    """A model whose gradients are given: the loss is the product with the weights."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, shape in {"first": (12, 16), "second": (16, 8), "bias": (8,)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))

    def loss(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([(self.get_parameter(name) * gradients[name]).sum() for name in gradients]).sum()


Sizes = Callable[[int, str], float]


def gradients(step: int, rank: int, size: Sizes = lambda step, name: 1.0) -> dict[str, torch.Tensor]:
    """A signal that all ranks share, and noise; entries differ in size by a factor of up to 1000."""
    found = {}
    for name, parameter in Given().named_parameters():
        sizes = torch.logspace(-3, 0, parameter.numel(), dtype=torch.float64).view(parameter.shape)
        generator = torch.Generator().manual_seed(1000 * step + rank)
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        found[name] = (0.5 + noise) * sizes * size(step, name)
    return found


def make(
    comm: Communicator, compressor: Any, optimizer: str = "AdamW", **options: Any
) -> tuple[Given, DistributedOptimizer]:
    model = Given()
    return model, DistributedOptimizer(
        OPTIMIZERS[optimizer](model.parameters()), model, comm=comm, compressor=compressor, **options
    )


def take_step(
    model: Given, optimizer: DistributedOptimizer, step: int, rank: int, size: Sizes = lambda step, name: 1.0
) -> None:
    optimizer.zero_grad()
    optimizer.scale(model.loss(gradients(step, rank, size))).backward()
    optimizer.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().view(-1).clone() for parameter in model.parameters()])


def scales(optimizer: DistributedOptimizer) -> dict[str, torch.Tensor]:
    """The scale of each whitened parameter."""
    found = {}
    for bucket in optimizer.reducer.buckets:
        if bucket.whitening is not None:
            for index, slot in enumerate(bucket.slots):
                found[slot.name] = slot.like(bucket.whitening.part(index)).clone()
    return found


def is_dense(optimizer: DistributedOptimizer) -> bool:
    """Whether the last step was dense, as the ledger has it."""
    names = {entry.account.compressor for entry in optimizer.wire.entries} - {"agreement", "dense"}
    return not names


def kinds_and_weights(
    comm: Communicator, num_steps: int, size: Sizes, compressor: Any = EFSIGN, **options: Any
) -> tuple[str, torch.Tensor]:
    model, optimizer = make(comm, compressor, **options)
    kinds = ""
    for step in range(num_steps):
        take_step(model, optimizer, step, comm.rank, size)
        kinds += "D" if is_dense(optimizer) else "."
    return kinds, weights(model)


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("overlap_step", [False, True])
def test_replicas_of_every_compressor_are_bit_identical(case: dict[str, Any], overlap_step: bool) -> None:
    def run(comm: Communicator) -> torch.Tensor:
        compressor = {**case, "min_numel": 1, "whiten": WHITEN}
        model, optimizer = make(comm, compressor, overlap_step=overlap_step)
        for step in range(14):
            take_step(model, optimizer, step, comm.rank)
        return torch.cat([weights(model), *(scale.view(-1) for scale in scales(optimizer).values())])

    results = simulate(3, run)
    assert results[0].isfinite().all()
    assert all(torch.equal(result, results[0]) for result in results)


def test_refreshes_grow_rarer_with_age() -> None:
    assert simulate(2, lambda comm: kinds_and_weights(comm, len(KINDS), lambda step, name: 1.0))[0][0] == KINDS


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_stepped_on(optimizer: str) -> None:
    """The mean gradient in its own units, and a second moment that compressed means do not change."""

    def run(comm: Communicator) -> None:
        model, ours = make(comm, EXACT, optimizer)
        reference = Given()
        inner = OPTIMIZERS[optimizer](reference.parameters())
        key = SECOND_MOMENTS.get(optimizer, "exp_avg_sq")
        for step, kind in enumerate(KINDS[:24]):
            before = scales(ours)
            take_step(model, ours, step, comm.rank)
            means = [gradients(step, rank) for rank in range(comm.world_size)]
            for name, parameter in reference.named_parameters():
                parameter.grad = torch.stack([mean[name] for mean in means]).mean(0)
                grad = model.get_parameter(name).grad
                torch.testing.assert_close(grad, parameter.grad, rtol=1e-12, atol=1e-15)
            inner.step()
            if step < 8:  # the warmup is the optimizer's own
                torch.testing.assert_close(weights(model), weights(reference), rtol=0, atol=1e-12)
                continue
            group = ours.param_groups[0]
            for name, scale in before.items():
                state = ours.state[model.get_parameter(name)]
                steps, grad = float(state["step"]), model.get_parameter(name).grad
                assert grad is not None
                root, square = scale - group["eps"], grad.square()
                if optimizer in SECOND_MOMENTS:
                    share = {"RMSprop": 0.01, "Adagrad": 1.0}[optimizer]
                    correction = {"RMSprop": 1.0, "Adagrad": steps}[optimizer]
                else:
                    share = 1 - group["betas"][1]
                    correction = 1 - group["betas"][1] ** steps
                if kind == ".":
                    expected = torch.maximum(correction * root.square(), share * square)
                    torch.testing.assert_close(scales(ours)[name], scale, rtol=0, atol=0)
                else:
                    new = scales(ours)[name] - group["eps"]
                    expected = correction * new.square()
                    # Between the old mean square and the new square.
                    low, high = torch.minimum(root.square(), square), torch.maximum(root.square(), square)
                    assert ((new.square() >= low * (1 - 1e-9)) & (new.square() <= high * (1 + 1e-9))).all()
                    assert not torch.equal(scales(ours)[name], scale)
                torch.testing.assert_close(state[key], expected, rtol=1e-9, atol=1e-18)

    simulate(2, run)


@pytest.mark.parametrize("loop", ["plain", "clipped", "accumulated", "two passes", "scaled"])
@pytest.mark.parametrize("overlap_step", [False, True])
def test_ranks_equal_one(loop: str, overlap_step: bool) -> None:
    """With a compressor that sends all, whitened gradients of N ranks are those of one that has all samples."""
    if loop in ("clipped", "scaled") and overlap_step:
        pytest.skip("gradients are there only after synchronize")

    def run(comm: Communicator, num_ranks: int) -> torch.Tensor:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=loop == "scaled")
        options: dict[str, Any] = {"grad_scaler": scaler} if loop == "scaled" else {}
        model, optimizer = make(comm, EXACT, overlap_step=overlap_step, **options)
        for step in range(16):
            optimizer.zero_grad()
            ranks = range(4) if num_ranks == 1 else [comm.rank]
            loss = torch.stack([model.loss(gradients(step, rank)) for rank in ranks]).mean()
            if loop == "accumulated":
                with optimizer.no_sync():
                    (loss / 2).backward(retain_graph=True)
                (loss / 2).backward()
            elif loop == "two passes":
                (loss / 4).backward(retain_graph=True)
                (loss * 3 / 4).backward()
            else:
                scaler.scale(loss).backward()
            if loop == "clipped":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        return weights(model)

    expected = simulate(1, lambda comm: run(comm, 1))[0]
    torch.testing.assert_close(simulate(4, lambda comm: run(comm, 4))[0], expected, rtol=0, atol=1e-9)


def test_what_is_sent_plus_what_is_pending_is_the_whitened_gradient() -> None:
    def run(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model, optimizer = make(comm, EFSIGN)
        sent = own = torch.zeros(())
        for step, kind in enumerate(KINDS):
            scale = scales(optimizer)["first"]
            take_step(model, optimizer, step, comm.rank)
            if kind == ".":
                assert model.first.grad is not None
                sent = sent + model.first.grad / scale
                own = own + gradients(step, comm.rank)["first"] / scale
        state = optimizer.state_dict()["compression"]["per_rank"]
        return sent, own, state["first/residual"].view(own.shape)

    results = simulate(3, run)
    sent = results[0][0]
    own, pending = (torch.stack([result[index] for result in results]).mean(0) for index in (1, 2))
    torch.testing.assert_close(sent + pending, own, rtol=0, atol=1e-9)
    assert (own - sent).abs().max() > 0.01, "something is pending"


@pytest.mark.parametrize("bad", [8, 9])
def test_a_skipped_step_leaves_no_trace(bad: int) -> None:
    """Neither a compressed one (step 8) nor a refresh (step 9)."""
    assert KINDS[8:10] == ".D"

    def run(comm: Communicator, skip: bool) -> dict[str, Any]:
        model, optimizer = make(comm, EFSIGN)
        for step in range(14):
            if skip and step == bad:
                take_step(model, optimizer, step, comm.rank, lambda step, name: 1e5 if comm.rank else float("inf"))
            take_step(model, optimizer, step, comm.rank)
        assert optimizer.skipped_steps == skip
        return {"weights": weights(model), **optimizer.state_dict()}

    for result, expected in zip(
        simulate(2, lambda comm: run(comm, True)), simulate(2, lambda comm: run(comm, False)), strict=True
    ):
        assert_equal(result, expected)


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert one == other


def grown(step: int, name: str) -> float:
    """Gradients that grow 100-fold in step 42."""
    return 1.0 if step < 42 else 100.0


@pytest.mark.parametrize("stop_at", [5, 20, 21, 38, 42, 43, 44, 50])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resuming_equals_no_stop_bit_for_bit(stop_at: int, optimizer: str) -> None:
    def run(comm: Communicator, stop: bool) -> tuple[str, torch.Tensor]:
        model, ours = make(comm, GUARDED, optimizer)
        kinds = ""
        for step in range(56):
            if stop and step == stop_at:
                state, kept = copy.deepcopy(ours.state_dict()), copy.deepcopy(model.state_dict())
                model, ours = make(comm, GUARDED, optimizer)
                model.load_state_dict(kept)
                ours.load_state_dict(state)
            take_step(model, ours, step, comm.rank, grown)
            kinds += "D" if is_dense(ours) else "."
        return kinds, weights(model)

    expected = simulate(2, lambda comm: run(comm, False))
    assert expected[0][0].startswith("D" * 20 + ".")
    assert "D.D" in expected[0][0][42:47], "refreshed as gradients have grown"
    for kinds, result in simulate(2, lambda comm: run(comm, True)):
        assert kinds == expected[0][0]
        assert torch.equal(result, expected[0][1])


def largest_step(comm: Communicator, compressor: Any, num_steps: int, size: Sizes) -> tuple[str, float]:
    """Return the kinds of all steps, and the largest change of a weight in a step, in units of the learning rate.

    That is at most 1 without compression.
    """
    model, optimizer = make(comm, compressor, "Adam")
    kinds, largest = "", 0.0
    for step in range(num_steps):
        before = weights(model)
        take_step(model, optimizer, step, comm.rank, size)
        largest = max(largest, ((weights(model) - before).abs().max() / 0.01).item())
        kinds += "D" if is_dense(optimizer) else "."
    return kinds, largest


@pytest.mark.parametrize("rank_that_sees_it", [None, 1])
def test_gradients_that_grow_are_refreshed_and_steps_stay_bounded(rank_that_sees_it: int | None) -> None:
    def size(rank: int) -> Sizes:
        return lambda step, name: grown(step, name) if rank_that_sees_it in (None, rank) else 1.0

    kinds, largest = simulate(2, lambda comm: largest_step(comm, GUARDED, 100, size(comm.rank)))[0]
    assert kinds[42] != kinds[43] == "D", "the first step with large gradients is a compressed one"
    assert "D.D" in kinds[43:47], "refreshed until the second moment has grown too"
    assert kinds[80:].count("D") <= 3, "and no longer"
    assert largest < 10


def test_gradients_that_shrink_are_refreshed() -> None:
    kinds, _ = simulate(2, lambda comm: largest_step(comm, GUARDED, 80, lambda step, name: 1 / grown(step, name)))[0]
    assert kinds[44:].count("D") >= 17, "a large second moment lasts"


@pytest.mark.parametrize("why", ["clipped", "large eps", "weight decay"])
def test_gradients_that_are_not_what_the_second_moment_says_are_not_refreshed_for_ever(why: str) -> None:
    def run(comm: Communicator, spec: Any) -> str:
        model = Given()
        decay, eps = 0.5 if why == "weight decay" else 0.0, 10.0 if why == "large eps" else 1e-8
        inner = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=eps, weight_decay=decay)
        optimizer = DistributedOptimizer(
            inner, model, comm=comm, compressor=spec, clip_norm=0.05 if why == "clipped" else None
        )
        kinds = ""
        for step in range(90):
            take_step(model, optimizer, step, comm.rank, lambda step, name: 0.01 if why == "weight decay" else 1.0)
            kinds += "D" if is_dense(optimizer) else "."
        return kinds

    unguarded = {**GUARDED, "whiten": {**GUARDED["whiten"], "band": 1e9}}
    planned = simulate(2, lambda comm: run(comm, unguarded))[0]
    kinds = simulate(2, lambda comm: run(comm, GUARDED))[0]
    assert kinds[:20] == planned[:20]
    assert kinds[40:].count("D") <= planned[40:].count("D") + 2


def test_a_layer_that_wakes_up_late_is_refreshed_and_steps_stay_bounded() -> None:
    def size(step: int, name: str) -> float:
        return 0.0 if name == "second" and step < 42 else 1.0

    kinds, largest = simulate(2, lambda comm: largest_step(comm, GUARDED, 80, size))[0]
    awake, _ = simulate(2, lambda comm: largest_step(comm, GUARDED, 42, lambda step, name: 1.0))[0]
    assert kinds[:42] == awake, "a gradient of zero is no reason to refresh"
    assert kinds[43] == "D"
    assert "D.D" in kinds[43:50]
    assert largest < 10


def test_a_young_second_moment_is_refreshed_often() -> None:
    kinds, _ = simulate(
        2, lambda comm: kinds_and_weights(comm, 160, lambda step, name: 1.0, {**EFSIGN, "whiten": True})
    )[0]
    expected = [*range(100), 119, 143, 171]  # each after a fifth of the steps so far
    assert [step for step, kind in enumerate(kinds) if kind == "D"] == [step for step in expected if step < 160]


def test_a_layer_that_thaws_late_has_a_warmup_of_its_own() -> None:
    def run(comm: Communicator) -> str:
        model = Given()
        model.second.requires_grad_(False)
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        optimizer = DistributedOptimizer(inner, model, comm=comm, compressor=EFSIGN, bucket_mb=0.001)
        kinds = ""
        for step in range(24):
            if step == 13:
                optimizer.unfreeze([model.second])
            take_step(model, optimizer, step, comm.rank)
            for account in [entry.account for entry in optimizer.wire.entries]:
                if account.bucket is not None and account.bucket.names == ("second",):
                    kinds += "D" if account.compressor == "dense" else "."
        return kinds

    assert simulate(2, run)[0] == KINDS[:11]


def test_a_half_precision_model() -> None:
    def run(comm: Communicator) -> torch.Tensor:
        model = Given(torch.bfloat16)
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        optimizer = DistributedOptimizer(inner, model, comm=comm, compressor=GUARDED)
        for step in range(30):
            optimizer.zero_grad()
            model.loss({name: one.bfloat16() for name, one in gradients(step, comm.rank).items()}).backward()
            optimizer.step()
        return weights(model)

    first, second = simulate(2, run)
    assert first.isfinite().all()
    assert torch.equal(first, second)


def test_a_plain_state_that_is_loaded_starts_a_new_warmup() -> None:
    def run(comm: Communicator) -> str:
        model, optimizer = make(comm, EFSIGN)
        for step in range(14):
            take_step(model, optimizer, step, comm.rank)
        plain = copy.deepcopy(optimizer.inner.state_dict())
        for state in plain["state"].values():
            state["exp_avg_sq"] *= 1e4
        optimizer.load_state_dict(plain)
        kinds = ""
        for step in range(10):
            take_step(model, optimizer, step, comm.rank)
            kinds += "D" if is_dense(optimizer) else "."
        assert optimizer.state[model.first]["exp_avg_sq"].mean() > 100 * 0.01, "it is not overwritten"
        return kinds

    assert simulate(2, run)[0] == KINDS[:10]


def test_parameters_without_gradients_in_some_steps_are_those_of_the_plain_optimizer_in_dense_steps() -> None:
    def run(comm: Communicator) -> None:
        model, optimizer = make(comm, {**EXACT, "dense_steps": 1000}, "Adam")
        reference = Given()
        inner = OPTIMIZERS["Adam"](reference.parameters())
        for step in range(40):
            used = ["first", "second", "bias"] if step % 4 == 0 else ["first", "bias"]
            optimizer.zero_grad()
            inner.zero_grad()
            given = gradients(step, comm.rank)
            model.loss({name: given[name] for name in used}).backward()
            optimizer.step()
            for name in used:
                means = [gradients(step, rank)[name] for rank in range(comm.world_size)]
                reference.get_parameter(name).grad = torch.stack(means).mean(0)
            inner.step()
        torch.testing.assert_close(weights(model), weights(reference), rtol=0, atol=1e-10)

    simulate(2, run)


def test_a_layer_whose_first_gradient_comes_late_has_a_warmup_of_its_own() -> None:
    def run(comm: Communicator) -> tuple[str, str]:
        model, optimizer = make(comm, EFSIGN)
        kinds = ""
        for step in range(34):
            optimizer.zero_grad()
            given = gradients(step, comm.rank)
            used = list(given) if step >= 20 else ["first", "bias"]
            model.loss({name: given[name] for name in used}).backward()
            optimizer.step()
            kinds += "D" if is_dense(optimizer) else "."
        return kinds[:20], kinds[20:]

    before, after = simulate(2, run)[0]
    assert before == KINDS[:20]
    assert after[1:8] == "D" * 7, "from the step after its first gradient on"
    assert "." in after[8:]


@pytest.mark.parametrize("scaled", [2.0**3, 2.0**10])
def test_a_loss_scale_changes_no_bit(scaled: float) -> None:
    def run(comm: Communicator, scale: float | None) -> torch.Tensor:
        options = {} if scale is None else {"loss_scale": LossScale(initial=scale, growth_interval=5)}
        return kinds_and_weights(comm, 20, lambda step, name: 1.0, **options)[1]

    expected = simulate(2, lambda comm: run(comm, None))[0]
    assert torch.equal(simulate(2, lambda comm: run(comm, scaled))[0], expected)


def test_a_rank_that_runs_out_of_data_follows() -> None:
    def run(comm: Communicator) -> dict[str, Any]:
        model, optimizer = make(comm, EFSIGN)
        for step in range(9 if comm.rank == 0 else 20):
            take_step(model, optimizer, step, comm.rank)
        optimizer.join()
        for step in range(20, 26):
            take_step(model, optimizer, step, comm.rank)
        return {"weights": weights(model), **scales(optimizer)}

    first, second = simulate(2, run)
    assert_equal(first, second)


def test_all_that_is_dense_is_sent_as_dense_as_says() -> None:
    def run(comm: Communicator) -> dict[str, int]:
        model, optimizer = make(comm, {**EFSIGN, "dense_as": "bf16"})
        for step in range(12):
            take_step(model, optimizer, step, comm.rank)
        assert set(scales(optimizer)) == {"first", "second"}
        return {name: traffic.num_collectives for name, traffic in optimizer.wire.by_compressor.items()}

    counts = simulate(2, run)[0]
    assert counts["efsign"] == KINDS[:12].count(".")
    assert counts["bf16"] == KINDS[:12].count("D") + 12, "refreshes; and the bias, which efsign does not accept"
    assert "dense" not in counts


@pytest.mark.parametrize(
    ("optimizer", "compressor", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), EFSIGN, "SGD is not known to have"),
        (lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True), EFSIGN, "amsgrad"),
        (lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True), EFSIGN, "centered"),
        (lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.0)), EFSIGN, "decay rate is 0"),
        (
            lambda p: torch.optim.Adam(p, lr=0.1),
            {**EFSIGN, "dense_as": "topk"},
            "dense_as='topk' should keep",
        ),
        (lambda p: torch.optim.Adam(p, lr=0.1), {**EFSIGN, "whiten": {"band": 1}}, "compressor.whiten.band=1"),
        (lambda p: torch.optim.Adam(p, lr=0.1), {**EFSIGN, "whiten": {"bands": 9}}, "compressor.whiten.band"),
    ],
)
def test_says_what_is_wrong(optimizer: Any, compressor: Any, message: str) -> None:
    def run(comm: Communicator) -> None:
        model = Given()
        DistributedOptimizer(optimizer(model.parameters()), model, comm=comm, compressor=compressor)

    with pytest.raises(UserError, match=message):
        simulate(1, run)


def test_takes_no_closure() -> None:
    def run(comm: Communicator) -> None:
        model, optimizer = make(comm, EFSIGN)
        with pytest.raises(UserError, match="closure"):
            optimizer.step(lambda: model.loss(gradients(0, 0)))

    simulate(1, run)
