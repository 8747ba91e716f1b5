"""Any order of backward, no_sync, synchronize, zero_grad, edits and step gives the result of one process."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import disttrain
from disttrain import UserError, compression
from disttrain.comm import Communicator, simulate
from tests.scripts import forms
from tests.scripts.judge import check_balance
from tests.scripts.programs import (
    Played,
    Program,
    Trace,
    drops,
    new_model,
    new_optimizer,
    programs,
    programs_by_rank,
    run,
)
from tests.scripts.world import Balance, OneProcess
from tests.support.compressing import CASES, case_id, make_bucket

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
SIZES = st.integers(2, 3)
TIMEOUT = 5.0  # seconds after which ranks that wait for each other are in a deadlock
BUCKETS = st.sampled_from([None, 1e-6])  # MiB: one bucket, or one a parameter


def run_rank(comm: Communicator, program: Program, bucket_mb: float | None) -> tuple[Trace, list[torch.Tensor]]:
    model = new_model()
    optimizer = disttrain.DistributedOptimizer(new_optimizer(model), model, comm=comm, bucket_mb=bucket_mb)
    trace = run(program, [comm.rank], model, optimizer)
    optimizer.join()  # where a step was skipped, another rank may have one more to take
    return trace, [parameter.detach() for parameter in model.parameters()]


def far_apart(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is not b
    return not torch.allclose(a, b, rtol=0, atol=1e-9)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data(), SIZES, BUCKETS)
def test_the_same_program_on_all_ranks_equals_one_process(
    data: st.DataObject, size: int, bucket_mb: float | None
) -> None:
    program = data.draw(programs(size))
    with forms.settings():
        model = new_model()
        expected = run(program, range(size), model, OneProcess(size).wrap(new_optimizer(model), model))
        for rank, (trace, _) in enumerate(simulate(size, lambda c: run_rank(c, program, bucket_mb), timeout=TIMEOUT)):
            for index, (seen, right) in enumerate(zip(trace, expected, strict=True)):
                for name, a, b in zip("ab", seen, right, strict=True):
                    assert not far_apart(a, b), f"exchange {index}, rank {rank}, {name}: {a} in place of {b}"


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data(), SIZES, BUCKETS)
def test_what_ranks_do_differently_is_right_or_one_error(
    data: st.DataObject, size: int, bucket_mb: float | None
) -> None:
    """A rank waits for the others or says what is wrong: no deadlock, and no weights that no reading explains.

    Where a rank drops means that others hold, all drop them, which no reading has; but they remain replicas.
    """
    by_rank = data.draw(programs_by_rank(size))
    with forms.settings():
        try:
            ranks = simulate(size, lambda comm: run_rank(comm, by_rank[comm.rank], bucket_mb), timeout=TIMEOUT)
        except UserError:
            return
        readings = [Played(by_rank, fresh=fresh, idle=idle).play() for fresh in (True, False) for idle in (True, False)]
    for _, own in ranks:
        assert not any(map(far_apart, own, ranks[0][1])), f"replicas part ways: {own} and {ranks[0][1]}"
    if any(map(drops, by_rank)):
        return
    weights = [tensor for _, own in ranks for tensor in own]
    assert any(not any(map(far_apart, weights, reading)) for reading in readings), f"{weights} is none of {readings}"


@pytest.mark.parametrize("size", [2, 3])
def test_readings_agree_if_ranks_do_the_same(size: int) -> None:
    """The check itself fails where it should."""

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(programs(size))
    def check(program: Program) -> None:
        with forms.settings():
            model = new_model()
            run(program, range(size), model, OneProcess(size).wrap(new_optimizer(model), model))
            for fresh in (True, False):
                for idle in (True, False):
                    weights = Played([program] * size, fresh=fresh, idle=idle).play()
                    expected = [parameter.detach() for parameter in model.parameters()] * size
                    assert not any(map(far_apart, weights, expected))

    check()


def has_feedback(case: dict[str, Any]) -> bool:
    if case["name"] in ("fp16", "bf16"):
        return False  # the roundings of a sum in half precision are nobody's residual
    state = compression.build(case).init_state(make_bucket(0, 2))
    return "residual" in state.tensors


FEEDBACK = [{**case, "min_numel": 1} for case in CASES if has_feedback(case)]
SHAPES = {"a": (12, 10), "b": (7, 16), "c": (5,)}
USES = st.sets(st.sampled_from("abc"))


@pytest.mark.parametrize("case", FEEDBACK, ids=case_id)
def test_nothing_is_lost_while_parameters_are_unused(case: dict[str, Any]) -> None:
    """-(w_T - w_0) + mean residual == mean sum of gradients, whichever parameters each step uses."""

    @settings(max_examples=max(EXAMPLES // 6, 5), deadline=None)
    @given(st.lists(st.lists(st.tuples(USES, USES), min_size=1, max_size=3), min_size=2, max_size=6), BUCKETS)
    def check(steps: list[list[tuple[set[str], set[str]]]], bucket_mb: float | None) -> None:
        """What each rank uses, by step and backward pass; all passes of a step but the last are under no_sync."""

        def rank(comm: Communicator) -> Any:
            model = nn.ParameterDict({name: torch.zeros(shape) for name, shape in SHAPES.items()})
            optimizer = disttrain.DistributedOptimizer(
                torch.optim.SGD(model.parameters(), lr=1.0), model, comm=comm, compressor=case, bucket_mb=bucket_mb
            )
            balance = Balance(optimizer, model)
            generator = torch.Generator().manual_seed(comm.rank)
            for passes in steps:
                optimizer.zero_grad()
                for index, uses in enumerate(passes):
                    total = torch.zeros((), requires_grad=True) * 1.0
                    for name in sorted(uses[comm.rank]):
                        total = total + (model[name] * torch.randn(SHAPES[name], generator=generator)).sum()
                    if index < len(passes) - 1:
                        with optimizer.no_sync():
                            total.backward()
                    else:
                        total.backward()
                optimizer.step()
            return balance.numbers()

        with forms.settings():
            check_balance(simulate(2, rank, timeout=TIMEOUT))

    check()
