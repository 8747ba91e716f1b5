"""The way back of two stages with an encoding of its own: when ``auto`` takes it, and how much it loses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disttrain import compression
from disttrain.collectives import AllGather, sent_bytes
from disttrain.compression.mean_encoders import mean_encoder
from disttrain.compression.payload import Layout
from disttrain.kernels import Feedback
from tests.support.compressing import Ranks, case_id, gradient, make_bucket

pytestmark = pytest.mark.usefixtures("one_thread")

BITS = [2, 3, 4, 8]
LARGE = ((4096, 4096),)  # so many bytes that another round does not count


def takes_two_stages(case: dict[str, Any], world_size: int) -> bool:
    return compression.build(case).num_rounds(make_bucket(0, world_size, LARGE, torch.float32)) == 2


@pytest.mark.parametrize(
    ("case", "first"),
    [
        # Received by all-gather (W-1) P, in two stages (W-1)/W (P + P2): from W = 1 + P2/P on.
        ({"name": "efsign"}, 3),
        ({"name": "efsign", "mean_bits": 2}, 4),
        ({"name": "efsign", "mean_bits": 4}, 6),
        ({"name": "efsign", "mean_bits": 8}, 10),
        ({"name": "blockwise8"}, 3),
        ({"name": "blockwise8", "mean_bits": 4}, 2),
        ({"name": "topk", "ratio": 0.01}, 32),
        ({"name": "topk", "ratio": 0.01, "mean_bits": 4}, 8),
        ({"name": "topk", "ratio": 0.01, "mean_bits": 4, "exchange": "two_stage"}, 2),
    ],
    ids=lambda value: case_id(value) if isinstance(value, dict) else "",
)
def test_auto_takes_what_receives_less(case: dict[str, Any], first: int) -> None:
    taken = {world_size: takes_two_stages(case, world_size) for world_size in (1, first - 1, first, 64)}
    assert taken == {world_size: world_size >= first for world_size in taken}


def test_auto_does_not_take_another_round_to_save_little() -> None:
    small = make_bucket(0, 16, ((64, 64),), torch.float32)
    assert compression.EFSign(mean_bits=4).num_rounds(small) == 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("numel", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_layout_is_that_of_the_payload(bits: int, numel: int, dtype: torch.dtype) -> None:
    bucket = make_bucket(0, 1, ((numel,),), dtype)
    payload = mean_encoder(bits).encode_with_residual(gradient(0, 0, numel, dtype), None, bucket, compression.State())
    assert mean_encoder(bits).layout(bucket) == Layout.of(payload)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_encoded_plus_the_residual_is_the_mean(bits: int) -> None:
    bucket = make_bucket(0, 1, ((5000,),))
    mean, residual, new, decoded = (gradient(0, rank, 5000) for rank in range(4))
    encoder, wanted = mean_encoder(bits), mean + residual
    payload = encoder.encode_with_residual(mean.clone(), Feedback(residual, new), bucket, compression.State())
    encoder.decode_mean([payload], decoded, bucket)
    torch.testing.assert_close(decoded + new, wanted, rtol=0, atol=1e-13)
    without = encoder.encode_with_residual(wanted.clone(), None, bucket, compression.State())
    assert all(torch.equal(without[name], section) for name, section in payload.items())
    twice = torch.empty_like(decoded)
    encoder.decode_mean([payload, payload], twice, bucket)
    torch.testing.assert_close(twice, decoded, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.37), (3, 0.31), (4, 0.14), (8, 0.008)])
def test_how_much_of_a_gaussian_is_lost(bits: int, bound: float) -> None:
    x = gradient(0, 0, 2**16)
    left = torch.empty_like(x)
    bucket = make_bucket(0, 1, ((x.numel(),),))
    mean_encoder(bits).encode_with_residual(x, Feedback(torch.zeros_like(x), left), bucket, compression.State())
    assert 0.7 * bound < left.norm() / x.norm() < bound


@pytest.mark.parametrize("bits", BITS)
def test_more_bits_bring_the_mean_closer_to_that_of_an_all_gather(bits: int) -> None:
    """The first stage is the same, as no chunk ends within a block."""

    def means(**options: Any) -> torch.Tensor:
        ranks = Ranks.make({"name": "efsign", "block_size": 256, **options}, 4, ((16, 256),), torch.float32)
        return torch.stack([step[0] for step in ranks.steps(12)])

    exact = means(exchange="all_gather")
    again = (means(exchange="two_stage") - exact).norm()
    error = (means(exchange="two_stage", mean_bits=bits) - exact).norm()
    assert error < {2: 0.7, 3: 0.5, 4: 0.25, 8: 0.02}[bits] * again


def test_the_mean_has_its_own_size() -> None:
    """A chunk is sent to each of the others, then one mean."""
    ranks = Ranks.make({"name": "efsign", "exchange": "two_stage", "mean_bits": 4}, 4, ((4, 8192),), torch.float32)
    ranks.steps(1)
    for rank, (to_owners, back) in enumerate(ranks.started[0]):
        assert isinstance(back, AllGather)
        assert sent_bytes(to_owners, 4, rank) == 3 * (8192 // 8 + 16)
        assert sent_bytes(back, 4, rank) == 8192 // 2 + 4 * 32
