from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from disttrain.errors import UserError
from disttrain.tasks import TensorData
from disttrain.training.data.loading import num_samples_of, to_device
from disttrain.training.data.sampler import ShardedSampler, Share

sizes = st.tuples(
    st.integers(1, 200),  # samples
    st.integers(1, 7),  # world size
    st.integers(1, 4),  # accumulation
    st.integers(1, 4),  # samples a rank and backward pass
)


def make_samplers(size: tuple[int, int, int, int], seed: int = 0, drop_last: bool = False) -> list[ShardedSampler]:
    num_samples, world_size, accumulation, per_pass = size
    return [
        ShardedSampler(
            num_samples,
            batch_size=world_size * accumulation * per_pass,
            accumulation=accumulation,
            seed=seed,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        for rank in range(world_size)
    ]


def take_epoch(sampler: ShardedSampler, num_steps: int | None = None) -> list[tuple[Share, list[list[int]]]]:
    """Go through (the beginning of) an epoch as a trainer does."""
    batches, taken = iter(sampler), []
    for share in sampler.shares():
        if len(taken) == num_steps:
            break
        taken.append((share, [next(batches) if start < stop else [] for start, stop in share.micro_batches]))
        sampler.advance(share)
    return taken


@given(sizes, st.integers(0, 3))
def test_every_sample_is_used_exactly_once_an_epoch(size: tuple[int, int, int, int], seed: int) -> None:
    samplers = make_samplers(size, seed)
    for epoch in range(2):
        assert all((sampler.epoch, sampler.offset) == (epoch, 0) for sampler in samplers)
        used = [index for sampler in samplers for _, parts in take_epoch(sampler) for part in parts for index in part]
        assert sorted(used) == list(range(size[0]))


@given(sizes)
def test_a_step_has_the_same_samples_on_any_number_of_ranks(size: tuple[int, int, int, int]) -> None:
    num_samples, world_size, accumulation, per_pass = size
    (alone,) = make_samplers((num_samples, 1, 1, world_size * accumulation * per_pass))
    together = [take_epoch(sampler) for sampler in make_samplers(size)]
    for step, (share, (expected,)) in enumerate(take_epoch(alone)):
        assert {rank[step][0].num_samples for rank in together} == {share.num_samples}
        # In order: by backward pass, then by rank.
        joined = [index for number in range(accumulation) for rank in together for index in rank[step][1][number]]
        assert joined == expected


@given(sizes)
def test_parts_differ_by_one_sample_at_most(size: tuple[int, int, int, int]) -> None:
    shares = [list(sampler.shares()) for sampler in make_samplers(size)]
    for step in zip(*shares, strict=True):
        for parts in zip(*(share.micro_batches for share in step), strict=True):
            lengths = [stop - start for start, stop in parts]
            assert max(lengths) - min(lengths) <= 1


@given(sizes, st.integers(0, 10))
def test_resuming_equals_no_stop(size: tuple[int, int, int, int], stop: int) -> None:
    for sampler, stopped, resumed in zip(make_samplers(size), make_samplers(size), make_samplers(size), strict=True):
        expected = take_epoch(sampler) + take_epoch(sampler)
        before = take_epoch(stopped, stop)
        resumed.epoch, resumed.offset = stopped.epoch, stopped.offset
        after = take_epoch(resumed)
        assert before + after == expected[: len(before) + len(after)]


@given(sizes)
def test_without_the_last_step_all_are_full(size: tuple[int, int, int, int]) -> None:
    num_samples, world_size, accumulation, per_pass = size
    batch_size = world_size * accumulation * per_pass
    for sampler in make_samplers(size, drop_last=True):
        if sampler.steps_per_epoch:
            steps = take_epoch(sampler)
            assert [share.num_samples for share, _ in steps] == [batch_size] * (num_samples // batch_size)
            assert (sampler.epoch, sampler.offset) == (1, 0)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = []
    for seed in (0, 1):
        (sampler,) = make_samplers((50, 1, 1, 50), seed)
        orders += [take_epoch(sampler)[0][1][0] for _ in range(2)]
    assert len({tuple(order) for order in orders}) == 4


def test_reading_ahead_does_not_move_the_position() -> None:
    (sampler,) = make_samplers((10, 1, 1, 2))
    assert len(list(sampler)) == 5
    assert (sampler.epoch, sampler.offset) == (0, 0)


def test_tensor_data_gives_batches_and_samples() -> None:
    data = TensorData(torch.arange(10.0).view(5, 2), torch.arange(5))
    inputs, labels = data.__getitems__([3, 1])
    assert inputs.tolist() == [[6, 7], [2, 3]]
    assert labels.tolist() == [3, 1]
    assert data[3][0].tolist() == [6, 7]
    assert len(data) == 5


Pair = namedtuple("Pair", ["x", "y"])


def test_all_tensors_of_a_batch_move_and_only_floats_change_their_type() -> None:
    batch = {"a": [torch.zeros(2), "text"], "b": Pair(torch.zeros(1, dtype=torch.float16), torch.zeros(1).long())}
    moved: Any = to_device(batch, torch.device("meta"), torch.float64)
    assert moved["a"][1] == "text"
    assert isinstance(moved["b"], Pair)
    assert [t.dtype for t in (moved["a"][0], *moved["b"])] == [torch.float64, torch.float64, torch.int64]
    assert all(t.device.type == "meta" for t in (moved["a"][0], *moved["b"]))


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


def test_data_without_a_length_is_refused() -> None:
    with pytest.raises(UserError, match="Endless has no length: data must be map-style"):
        num_samples_of(Endless())


class Growing(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return 3


def test_map_style_data_has_a_length() -> None:
    assert num_samples_of(Growing()) == 3
