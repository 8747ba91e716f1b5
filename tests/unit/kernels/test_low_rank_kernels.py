"""PowerSGD's compiled kernels against the reference, over several matrices at once."""

from __future__ import annotations

import math

import pytest
import torch

from disttrain.kernels import Kernels, for_device
from disttrain.kernels.factors import Sizes, p_sizes, q_sizes, split_factor
from tests.unit.kernels.orthonormal_checks import check_orthogonalize

pytest.importorskip("numba")

REFERENCE, FAST = Kernels(), for_device(torch.device("cpu"))
SHAPES = [(1, 1, 1), (5, 7, 2), (64, 33, 4), (3, 200, 3), (40, 16, 1)]
WIDE = [(64, 33, 4), (30, 50, 7)]  # with a rank from which on the product is torch's
DTYPES = [torch.float32, torch.float64]


def randn(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def factor(sizes: Sizes, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return randn(sum(rank * size for rank, size in sizes), dtype, seed)


def assert_close(fast: torch.Tensor, slow: torch.Tensor) -> None:
    tolerance = 200 * torch.finfo(slow.dtype).eps
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance * max(1.0, float(slow.abs().max())))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [SHAPES, WIDE])
def test_products_and_rests_are_those_of_the_reference(shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
    numel = sum(rows * columns for rows, columns, _ in shapes)
    grad, residual = randn(numel, dtype, 0), randn(numel, dtype, 1)
    p, mean_p = (factor(p_sizes(shapes), dtype, seed) for seed in (2, 3))
    q, mean_q = (factor(q_sizes(shapes), dtype, seed) for seed in (4, 5))
    for added in (residual, None):
        totals = [grad.clone(), grad.clone()]
        if added is not None:
            fast, slow = (
                kernels.project(total, added, q, shapes)
                for kernels, total in zip((FAST, REFERENCE), totals, strict=True)
            )
            assert_close(fast, slow)
            assert torch.equal(*totals)
            totals = [grad.clone(), grad.clone()]
        fast, slow = (
            kernels.project_back(total, added, p, shapes)
            for kernels, total in zip((FAST, REFERENCE), totals, strict=True)
        )
        assert_close(fast, slow)
        assert torch.equal(*totals)
        assert torch.equal(totals[0], grad if added is None else grad + added)
    totals, rests = [grad.clone(), grad.clone()], [torch.full_like(grad, math.nan) for _ in range(2)]
    for kernels, total, rest in zip((FAST, REFERENCE), totals, rests, strict=True):
        kernels.low_rank_residual(total, (p, q), (mean_p, mean_q), rest, shapes)
    assert_close(*totals)
    assert_close(*rests)
    pairs = zip(split_factor(p, p_sizes(shapes)), split_factor(q, q_sizes(shapes)), strict=True)
    sent = torch.cat([(left.T @ right).view(-1) for left, right in pairs])
    assert_close(rests[0] + sent, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", [FAST, REFERENCE], ids=["compiled", "reference"])
def test_any_rows_become_orthonormal(kernels: Kernels, dtype: torch.dtype) -> None:
    check_orthogonalize(kernels, dtype, torch.device("cpu"), longest=50_257)  # a vocabulary's


def test_replicated_results_are_computed_in_the_order_written() -> None:
    """Whatever vectors a rank's processor has: means are formed on every rank, from the same numbers."""
    from disttrain.kernels.cpu import loops_low_rank, loops_sparse

    for loop in (loops_low_rank._row_of_product, loops_low_rank._steady_dot, loops_low_rank._reflect):
        assert not loop.targetoptions.get("fastmath"), loop
    assert not loops_sparse.scatter.targetoptions.get("fastmath")
    assert loops_low_rank._add_and_multiply.targetoptions["fastmath"], "the option has another name"


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_are_scaled_and_filled_up_to_the_bit(dtype: torch.dtype) -> None:
    sizes = [(2, 30), (3, 5), (1, 1)]
    new, old = factor(sizes, dtype, 0), factor(sizes, dtype, 1)
    new[30:60] = 0
    new[65:70] = 0
    new[-1] = 0
    assert torch.equal(FAST.scale_factor(new, sizes), REFERENCE.scale_factor(new, sizes))
    assert torch.equal(FAST.scale_factor(torch.zeros_like(new), sizes), torch.zeros_like(new))
    filled = FAST.fill_zero_rows(new, old, sizes)
    assert torch.equal(filled, REFERENCE.fill_zero_rows(new, old, sizes))
    wanted = new.clone()
    for start, end in ((30, 60), (65, 70), (75, 76)):
        wanted[start:end] = old[start:end]
    assert torch.equal(filled, wanted)
