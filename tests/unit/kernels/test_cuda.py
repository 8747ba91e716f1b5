"""The GPU's kernels against the reference on a CPU: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="triton is not installed")

from disttrain.kernels import Chunks, Feedback, Kernels  # noqa: E402
from disttrain.kernels.cuda.kernels import CudaKernels  # noqa: E402
from tests.unit.kernels.orthonormal_checks import check_orthogonalize  # noqa: E402

pytestmark = pytest.mark.timeout(300)  # the interpreter is slow
REFERENCE, KERNELS = Kernels(), CudaKernels()
DTYPES = [torch.float32, torch.float64]


def vector(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    values[: numel // 4] = 0
    return values


def ties(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randint(-9, 10, (numel,), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 1024, 5000])
@pytest.mark.parametrize(
    ("has_residual", "has_feedback"), [(False, False), (False, True), (True, True)], ids=["none", "in place", "both"]
)
@pytest.mark.parametrize("make", [vector, ties])
def test_sparsification_is_the_reference(
    make: Callable[[int, torch.dtype, int], torch.Tensor],
    numel: int,
    has_residual: bool,
    has_feedback: bool,
    dtype: torch.dtype,
) -> None:
    grad, residual = make(numel, dtype, 0), make(numel, dtype, 1) if has_residual else None
    total = grad if residual is None else grad + residual

    def run(kernels: Kernels, name: str, device: torch.device, *arguments: float) -> list[object]:
        """What is returned, and the new residual."""
        own = grad.to(device, copy=True)
        feedback = None
        if has_feedback and residual is None:
            feedback = Feedback.in_place(own)
        elif residual is not None:
            feedback = Feedback(residual.to(device, copy=True), torch.full_like(own, math.nan))
        found = list(getattr(kernels, name)(own, feedback, *arguments))
        if feedback is None or feedback.residual is not None:
            assert torch.equal(own.cpu(), grad)
        if feedback is not None:
            found.append(feedback.new_residual)
        if feedback is not None and feedback.residual is not None and residual is not None:
            assert torch.equal(feedback.residual.cpu(), residual)
            # The gradient may also be where the new residual goes.
            again = getattr(kernels, name)(own, feedback._replace(new_residual=own), *arguments)
            assert_same([*again, own], found)
        return found

    def check(name: str, *arguments: float) -> None:
        expected = run(REFERENCE, name, torch.device("cpu"), *arguments)
        assert_same(run(KERNELS, name, DEVICE, *arguments), expected)

    for k in {1, max(1, numel // 100), max(1, numel // 10), numel}:
        check("take_largest", k)
    for threshold in (0.0, 0.5, 3e38):
        num_above = int(((total.abs() >= threshold) & (total != 0)).sum())
        for capacity in {1, max(1, num_above - 1), num_above + 3}:
            check("take_above", threshold, capacity)


def assert_same(found: list[object], expected: list[object]) -> None:
    for own, other in zip(found, expected, strict=True):
        if isinstance(own, torch.Tensor) and isinstance(other, torch.Tensor):
            assert torch.equal(own.cpu(), other.cpu())
        else:
            assert own == other


@pytest.mark.parametrize("has_feedback", [False, True])
@pytest.mark.parametrize("wanted", ["too few", "too many"])
def test_a_threshold_that_finds_too_few_or_too_many_is_made_up_for(wanted: str, has_feedback: bool) -> None:
    if wanted == "too few":
        # Every other run of 16 is sampled, and there are the 600 entries that are taken for all.
        k, grad = 960, torch.zeros(8192)
        grad.view(-1, 32)[:, :16] = torch.where(torch.arange(4096).view(-1, 16) < 600, 2.0, 1.0)
        found_at_most, found_at_least = k - 1, 0
    else:
        k, grad = 64, torch.ones(8192)
        found_at_most, found_at_least = 8192, 2 * k + 1025
    threshold = REFERENCE.estimate_threshold(grad, None, 1.25 * k / grad.numel())
    assert found_at_least <= int((grad >= threshold).sum()) <= found_at_most, "the test is of no use"
    totals = [grad.clone(), grad.to(DEVICE, copy=True)]
    values, indices = REFERENCE.take_largest(totals[0], Feedback.in_place(totals[0]) if has_feedback else None, k)
    own = KERNELS.take_largest(totals[1], Feedback.in_place(totals[1]) if has_feedback else None, k)
    assert_same([*own, totals[1]], [values, indices, totals[0]])


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_sizes_do_not_depend_on_values(spoilt: float) -> None:
    grad = vector(5000, torch.float32, 0).to(DEVICE)
    grad[::100] = spoilt
    values, indices = KERNELS.take_largest(total := grad.clone(), Feedback.in_place(total), 7)
    assert (values.numel(), indices.numel()) == (7, 7)
    values, indices, count = KERNELS.take_above(total := grad.clone(), Feedback.in_place(total), 0.5, 9)
    expected = REFERENCE.take_above(total := grad.cpu().clone(), Feedback.in_place(total), 0.5, 9)
    assert torch.equal(values.cpu(), expected[0])
    assert torch.equal(indices.cpu(), expected[1])
    assert count == expected[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("numel", "chunk", "ratio"), [(1, 16, 1.0), (200, 64, 0.1), (128, 64, 1.0), (4200, 4096, 0.02)]
)
@pytest.mark.parametrize("value_bits", [None, 4, 16])
@pytest.mark.parametrize("make", [vector, ties])
def test_chunks_are_the_reference(
    make: Callable[[int, torch.dtype, int], torch.Tensor],
    value_bits: int | None,
    numel: int,
    chunk: int,
    ratio: float,
    dtype: torch.dtype,
) -> None:
    grad, residual = make(numel, dtype, 0), make(numel, dtype, 1)
    chunks = Chunks(chunk, max(1, round(ratio * chunk)), max(1, round(ratio * (numel % chunk))))
    new_residual, own_new_residual = torch.empty_like(grad), torch.empty_like(grad, device=DEVICE)
    expected = REFERENCE.take_largest_of_chunks(grad, Feedback(residual, new_residual), chunks, value_bits)
    own_feedback = Feedback(residual.to(DEVICE), own_new_residual)
    entries = KERNELS.take_largest_of_chunks(grad.to(DEVICE), own_feedback, chunks, value_bits)
    assert_same([*entries, own_new_residual], [*expected, new_residual])
    means = [torch.ones_like(grad), torch.ones_like(grad, device=DEVICE)]
    REFERENCE.chunks_mean([expected] * 3, chunks, value_bits, means[0], add=True)
    KERNELS.chunks_mean([entries] * 3, chunks, value_bits, means[1], add=True)
    assert torch.equal(means[1].cpu(), means[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_without_feedback_leave_the_gradient(dtype: torch.dtype) -> None:
    grad = vector(200, dtype, 0)
    grad[7] = math.nan
    expected = REFERENCE.take_largest_of_chunks(grad, None, Chunks(64, 6, 1), 4)
    own = grad.to(DEVICE, copy=True)
    assert_same(list(KERNELS.take_largest_of_chunks(own, None, Chunks(64, 6, 1), 4)), list(expected))
    assert torch.equal(own.cpu().nan_to_num(), grad.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 63, 64, 200])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", [None, 12345, 2**31 + 7])
def test_quantize_is_the_reference(numel: int, bits: int, seed: int | None, dtype: torch.dtype) -> None:
    grad, residual = vector(numel, dtype, 0), vector(numel, dtype, 1)
    new_residual, own_new_residual = torch.empty_like(grad), torch.empty_like(grad, device=DEVICE)
    codes, scales = REFERENCE.quantize(grad, Feedback(residual, new_residual), bits, 64, seed)
    own_feedback = Feedback(residual.to(DEVICE), own_new_residual)
    own_codes, own_scales = KERNELS.quantize(grad.to(DEVICE), own_feedback, bits, 64, seed)
    assert torch.equal(own_codes.cpu(), codes)
    assert torch.equal(own_scales.cpu(), scales)
    # One rounding of entries up to 4, where the reference fuses a product and a sum.
    torch.testing.assert_close(own_new_residual.cpu(), new_residual, rtol=0, atol=4 * torch.finfo(dtype).eps)
    check_means("dequantize_mean", [codes, codes.flip(0)], [scales, scales], (bits, 64), torch.ones_like(grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 63, 64, 200])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("name", ["sign", "sign_and_level"])
def test_sign_is_the_reference(name: str, numel: int, with_residual: bool, dtype: torch.dtype) -> None:
    grad, residual = vector(numel, dtype, 0), vector(numel, dtype, 1)
    feedback, own_feedback = (
        Feedback(residual.to(device), torch.empty_like(grad, device=device)) if with_residual else None
        for device in ("cpu", DEVICE)
    )
    bits, scales = getattr(REFERENCE, name)(grad, feedback, 64)
    own_bits, own_scales = getattr(KERNELS, name)(grad.to(DEVICE), own_feedback, 64)
    assert torch.equal(own_bits.cpu(), bits)
    torch.testing.assert_close(own_scales.cpu(), scales, rtol=1e-6, atol=0)
    if feedback is not None and own_feedback is not None:
        torch.testing.assert_close(own_feedback.new_residual.cpu(), feedback.new_residual, rtol=1e-5, atol=1e-6)
    check_means(f"{name}_mean", [bits, bits.flip(0)], [scales, scales], (64,), torch.ones_like(grad))


def check_means(
    name: str, payloads: list[torch.Tensor], scales: list[torch.Tensor], form: tuple[int, ...], out: torch.Tensor
) -> None:
    own = out.to(DEVICE, copy=True)
    takes_factors = name != "sign_and_level_mean"
    for add, with_factors in itertools.product((False, True), (False, True) if takes_factors else (False,)):
        factors = torch.linspace(0, 2, len(out), dtype=out.dtype)
        of_reference, of_own = ({"factors": factors.to(device)} if with_factors else {} for device in ("cpu", DEVICE))
        getattr(REFERENCE, name)(payloads, scales, *form, out, add=add, **of_reference)
        parts, sizes = ([part.to(DEVICE) for part in all_parts] for all_parts in (payloads, scales))
        getattr(KERNELS, name)(parts, sizes, *form, own, add=add, **of_own)
        torch.testing.assert_close(own.cpu(), out, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_rows_become_orthonormal(dtype: torch.dtype) -> None:
    check_orthogonalize(KERNELS, dtype, DEVICE, longest=3000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_are_scaled_and_filled_up_to_the_bit(dtype: torch.dtype) -> None:
    sizes = [(2, 1100), (3, 5), (1, 1)]
    new, old = (vector(2216, dtype, seed) for seed in (0, 1))
    new[1100:2200] = 0
    new[2205:2210] = 0
    new[-1] = 0
    on_device = new.to(DEVICE, copy=True), old.to(DEVICE, copy=True)
    assert torch.equal(KERNELS.scale_factor(on_device[0], sizes).cpu(), REFERENCE.scale_factor(new, sizes))
    assert torch.equal(KERNELS.fill_zero_rows(*on_device, sizes).cpu(), REFERENCE.fill_zero_rows(new, old, sizes))
    assert torch.equal(on_device[0].cpu(), new)
    new[10] = math.nan
    new[1100:1110] = math.nan  # no row of zeros, then
    filled = KERNELS.fill_zero_rows(new.to(DEVICE), on_device[1], sizes).cpu()
    assert torch.equal(filled.isnan(), new.isnan())
    assert not filled[1110:2200].any()
