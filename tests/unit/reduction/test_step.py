"""The phases of a step and the stages of its buckets: what may follow what, and what dropped gradients leave."""

from __future__ import annotations

import pytest
import torch

from disttrain.comm import Communicator, SingleProcess, simulate
from disttrain.reduction import SquaredNorms
from disttrain.reduction.buckets.bucket import Stage
from disttrain.reduction.loss_weights import LossWeights
from disttrain.reduction.step import Phase
from tests.unit.reduction.test_reducer import MLP, build, gradients, mean_gradient, squares


def test_buckets_follow_the_phases_of_the_step() -> None:
    model, optimizer = build(MLP, SingleProcess())
    reducer = optimizer.reducer

    def stages() -> set[Stage]:
        return {bucket.stage for bucket in reducer.buckets}

    assert (reducer.step.phase, stages()) == (Phase.EMPTY, {Stage.IDLE})
    with optimizer.no_sync():
        squares(model, 0).backward()
    assert (reducer.step.phase, stages()) == (Phase.EMPTY, {Stage.IDLE})
    seen: list[set[Stage]] = []
    model[0].weight.register_hook(lambda grad: seen.append(stages()))
    squares(model, 0).backward()
    assert Stage.GATHERING in seen[0]
    assert seen[0] <= {Stage.GATHERING, Stage.IN_FLIGHT}
    assert (reducer.step.phase, stages()) == (Phase.AVERAGED, {Stage.EXPOSED})
    squares(model, 0).backward()
    assert (reducer.step.phase, stages()) == (Phase.AVERAGED, {Stage.EXPOSED})
    optimizer.step()
    assert (reducer.step.phase, stages()) == (Phase.EMPTY, {Stage.IDLE})


def test_a_stage_cannot_be_left_out() -> None:
    model, optimizer = build(MLP, SingleProcess())
    bucket = optimizer.reducer.buckets[0]
    with pytest.raises(AssertionError, match=r"from Stage\.IDLE to Stage\.CLOSED"):
        bucket.close()
    bucket.open()
    with pytest.raises(AssertionError, match=r"from Stage\.GATHERING to Stage\.IN_FLIGHT"):
        bucket.launch(bucket.flat)
    with pytest.raises(AssertionError, match=r"from Stage\.GATHERING to Stage\.GATHERING"):
        bucket.open()
    del model


def test_a_weight_counts_where_gradients_were_dropped_just_before() -> None:
    def run(comm: Communicator) -> list[torch.Tensor | None]:
        model, optimizer = build(MLP, comm)
        optimizer.scale(squares(model, comm.rank), weight=1.0).backward()
        for parameter in model.parameters():
            parameter.grad = None
        optimizer.scale(squares(model, comm.rank), weight=3.0 + comm.rank).backward()
        return gradients(model)

    wanted = mean_gradient(MLP, 2, lambda model, rank: squares(model, rank) * (3.0 + rank) * 2 / 7)
    for result in simulate(2, run):
        torch.testing.assert_close(result, wanted)


def test_weights_make_one_mean_of_several_exchanges() -> None:
    weights = LossWeights()
    assert weights.combine() == (1.0, 1.0)
    weights.add(1.0)
    assert weights.is_pending
    weights.mean = 1.0
    assert not weights.is_pending
    assert weights.combine() == (1.0, 0.0)
    weights.clear()
    weights.add(3.0)
    weights.mean = 3.0
    assert weights.combine() == (0.75, 0.25)


def test_old_names_of_norms_warn() -> None:
    norms = SquaredNorms(2.0, 1.0)
    with pytest.warns(DeprecationWarning, match=r"use SquaredNorms\.local"):
        assert norms.part == norms.local == 2.0
    with pytest.warns(DeprecationWarning, match=r"use SquaredNorms\.averaged"):
        assert norms.whole == norms.averaged == 1.0
