"""The compiled CPU kernels against the reference in torch: equal to the bit, but for where sums are reordered."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disttrain.kernels import Chunks, Entries, Feedback, Kernels, Units, for_device
from disttrain.kernels.blocks import widths
from disttrain.kernels.chunks import POSITION_BITS, unpack

pytest.importorskip("numba")

REFERENCE, FAST = Kernels(), for_device(torch.device("cpu"))
SIZES = [1, 15, 16, 17, 63, 64, 65, 1000, 5000]  # the last one is past where take_largest has a way of its own
BLOCK = 64
DTYPES = [torch.float32, torch.float64]

KINDS: dict[str, Callable[[int, torch.Generator], torch.Tensor]] = {
    "normal": lambda size, generator: torch.randn(size, generator=generator, dtype=torch.float64),
    "ties": lambda size, generator: torch.randint(-3, 4, (size,), generator=generator).double(),
    "zeros": lambda size, generator: torch.zeros(size, dtype=torch.float64),
    "equal": lambda size, generator: torch.full((size,), -2.5, dtype=torch.float64),
    "spike": lambda size, generator: torch.nn.functional.one_hot(torch.tensor(size // 2), size).double() * -7,
    "scales": lambda size, generator: (
        torch.randn(size, generator=generator, dtype=torch.float64) * torch.logspace(-30, 30, size, dtype=torch.float64)
    ),
    "denormal": lambda size, generator: torch.full((size,), 1e-310, dtype=torch.float64),
}

Sample = tuple[torch.Tensor, "torch.Tensor | None", bool]  # grad, residual, whether there is error feedback
Returned = tuple[Any, ...]


def make(kind: str, size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return KINDS[kind](size, torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[(kind, dtype) for kind in KINDS for dtype in DTYPES], ids=str)
def samples(request: pytest.FixtureRequest) -> Iterator[Sample]:
    """Over all sizes: no feedback, feedback in place, feedback with a residual."""
    kind, dtype = request.param
    return iter(
        [
            (make(kind, size, dtype), make(kind, size, dtype, 1) if has_residual else None, has_feedback)
            for size in SIZES
            for has_residual, has_feedback in ((False, False), (False, True), (True, True))
        ]
    )


def both(name: str, sample: Sample, *arguments: object) -> tuple[Returned, Returned]:
    """What each backend returns, and the new residual that it writes."""
    grad, residual, has_feedback = sample
    results = []
    for kernels in (REFERENCE, FAST):
        own = grad.clone()
        feedback = None
        if has_feedback:
            feedback = Feedback.in_place(own) if residual is None else feedback_of(residual.clone())
        returned = getattr(kernels, name)(own, feedback, *arguments)
        results.append((*returned, None if feedback is None else feedback.new_residual))
        if feedback is None or feedback.residual is not None:
            assert torch.equal(own, grad), f"{name} wrote into the gradient"
        if feedback is not None and feedback.residual is not None:
            assert torch.equal(feedback.residual, residual), f"{name} wrote into the residual"
            own = grad.clone()  # which may also be where the new residual goes
            returned = getattr(kernels, name)(own, feedback._replace(new_residual=own), *arguments)
            assert_same(results[-1], (*returned, own))
    return results[0], results[1]


def feedback_of(residual: torch.Tensor) -> Feedback:
    return Feedback(residual, torch.full_like(residual, math.nan))


def assert_same(reference: Returned, fast: Returned) -> None:
    for a, b in zip(reference, fast, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b


def total_of(sample: Sample) -> torch.Tensor:
    grad, residual, _ = sample
    return grad if residual is None else grad + residual


@pytest.mark.parametrize("kind", ["normal", "zeros", "equal", "spike"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whiten(kind: str, dtype: torch.dtype) -> None:
    for size in (*SIZES, 10_000):
        grad, scale = make(kind, size, dtype), make("normal", size, dtype, 1).abs() + 0.1
        sizes = [size // 3, 0, size - size // 3]
        results = []
        for kernels in (REFERENCE, FAST):
            own = grad.clone()
            squares = kernels.whiten(own, scale, sizes, 1.5)
            torch.testing.assert_close(kernels.whitened_squares(grad, scale, sizes), squares, rtol=1e-5, atol=0)
            assert own.abs().max() <= 1.5
            results.append((own, squares))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=0)
        whitened = (grad / scale).double().split(sizes)
        expected = torch.stack([(part.square().sum() / max(1, part.numel())) for part in whitened])
        torch.testing.assert_close(results[0][1], expected, rtol=1e-5, atol=0)


def test_whitened_squares_of_large_parts_are_of_a_sample() -> None:
    grad, scale = make("normal", 70_000, torch.float32), torch.full((70_000,), 0.5)
    sampled, exact = (REFERENCE.whitened_squares(grad, scale, [69_000, 1000]), (grad / scale).square())
    torch.testing.assert_close(FAST.whitened_squares(grad, scale, [69_000, 1000]), sampled, rtol=1e-5, atol=0)
    assert abs(sampled[0] / exact[:69_000].mean() - 1) < 0.1
    assert sampled[0] != pytest.approx(float(exact[:69_000].double().mean()), rel=1e-5)
    assert sampled[1] == pytest.approx(float(exact[69_000:].double().mean()), rel=1e-5)


@pytest.mark.parametrize("has_units", [False, True])
@pytest.mark.parametrize("name", ["sign", "quantize"])
def test_gradients_are_converted_to_units(name: str, has_units: bool) -> None:
    for size in SIZES:
        grad, residual = make("normal", size, torch.float32), make("normal", size, torch.float32, 1)
        scale = make("normal", size, torch.float32, 2).abs() + 0.1
        more = (BLOCK,) if name == "sign" else (4, BLOCK, None)
        results = []
        for kernels in (REFERENCE, FAST):
            feedback = feedback_of(residual.clone())
            own = grad.clone()
            if has_units:
                feedback = feedback._replace(units=Units(scale, 3.0))
            else:
                kernels.whiten(own, scale, [size], 3.0)
            results.append((*getattr(kernels, name)(own, feedback, *more), feedback.new_residual))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_moment_is_held_by_what_adam_does_to_it(dtype: torch.dtype) -> None:
    scale, grad = make("normal", 5000, dtype).abs() + 0.1, make("normal", 5000, dtype, 1) * 3
    eps, whole, share, decay = 1e-3, 0.7, 0.05, 0.95
    expected = torch.maximum(whole * (scale - eps).square(), share * grad.square())
    assert 0.001 < (expected == share * grad.square()).double().mean() < 0.9, "both happen"
    results = []
    for kernels in (REFERENCE, FAST):
        for shape in ((5000,), (50, 100)):
            held = torch.empty(shape, dtype=dtype)
            kernels.hold_second_moment(scale.view(shape), grad.view(shape), (eps, whole, share, decay), held)
            results.append(held.view(-1))
            updated = held.view(-1) * decay + share * grad.square()
            torch.testing.assert_close(updated, expected, rtol=1e-5, atol=1e-7)
    for held in results[1:]:
        torch.testing.assert_close(held, results[0], rtol=1e-5, atol=1e-6)
    half = torch.empty(5000, dtype=torch.bfloat16)
    FAST.hold_second_moment(scale, grad.bfloat16(), (eps, whole, share, decay), half)
    torch.testing.assert_close(half.to(dtype), results[0], rtol=0.02, atol=0.02)


def test_the_fast_backend_is_not_the_reference() -> None:
    assert type(FAST) is not Kernels


def test_take_largest(samples: Iterator[Sample]) -> None:
    for sample in samples:
        total, size = total_of(sample), len(sample[0])
        for k in {1, max(1, size // 100), max(1, size // 10), size}:
            reference, fast = both("take_largest", sample, k)
            assert_same(reference, fast)
            values, indices, new_residual = fast
            assert values.numel() == k
            assert indices.dtype == torch.int32
            assert (indices.diff() > 0).all()
            assert torch.equal(values, total[indices.long()])
            assert torch.equal(values.abs().sort().values, total.abs().sort().values[size - k :])
            assert new_residual is None or torch.equal(new_residual.index_add(0, indices.long(), values), total)


def test_take_largest_takes_the_first_of_equals() -> None:
    grad = torch.ones(5000)
    grad[4000:4010] = 2
    for kernels in (REFERENCE, FAST):
        _, indices = kernels.take_largest(grad, None, 40)
        assert indices.tolist() == [*range(30), *range(4000, 4010)]


@pytest.mark.parametrize("size", [100, 5000])
def test_sizes_do_not_depend_on_values(size: int) -> None:
    """A rank whose gradient is spoilt sends as much as the others, who count on it."""
    for spoilt in (math.nan, math.inf):
        grad = make("normal", size, torch.float32)
        grad[:: size // 50] = spoilt
        for kernels in (REFERENCE, FAST):
            values, indices = kernels.take_largest(total := grad.clone(), Feedback.in_place(total), 7)
            assert (values.numel(), indices.numel()) == (7, 7)
            assert ((indices >= 0) & (indices < size)).all()
            for capacity in (9, size):
                values, indices, count = kernels.take_above(
                    total := grad.clone(), Feedback.in_place(total), 0.5, capacity
                )
                expected = REFERENCE.take_above(total := grad.clone(), Feedback.in_place(total), 0.5, capacity)
                assert_same((values, indices, count), expected)
            assert isinstance(kernels.estimate_threshold(grad, None, 0.1), float)


def test_take_above(samples: Iterator[Sample]) -> None:
    for sample in samples:
        total, size = total_of(sample), len(sample[0])
        for threshold in (0.0, 0.5, 2.5, 3e38):
            num_above = int(((total.abs() >= threshold) & (total != 0)).sum())
            for capacity in {1, max(1, num_above - 1), num_above + 3, size}:
                reference, fast = both("take_above", sample, threshold, capacity)
                assert_same(reference, fast)
                values, indices, count, new_residual = fast
                assert count == num_above
                taken = min(count, capacity)
                assert values.numel() == indices.numel() == capacity
                assert not values[taken:].any()
                assert not indices[taken:].any()
                assert values[:taken].all()
                assert new_residual is None or torch.equal(new_residual.index_add(0, indices.long(), values), total)


def test_estimate_threshold(samples: Iterator[Sample]) -> None:
    for grad, residual, _ in samples:
        for share in (0.01, 0.3, 1.0):
            feedback = None if residual is None else feedback_of(residual)
            expected = REFERENCE.estimate_threshold(grad, feedback, share)
            assert FAST.estimate_threshold(grad, feedback, share) == expected
            assert feedback is None or feedback.new_residual.isnan().all()
            magnitudes = (grad if residual is None else grad + residual).abs()
            assert expected in magnitudes


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_estimate_is_near(dtype: torch.dtype) -> None:
    grad, residual = make("normal", 300_000, dtype), make("normal", 300_000, dtype, 1)
    for share in (0.001, 0.01, 0.3):
        threshold = REFERENCE.estimate_threshold(grad, feedback_of(residual), share)
        assert 0.8 <= float(((grad + residual).abs() >= threshold).double().mean()) / share <= 1.25


def test_sparse_mean() -> None:
    for dtype in DTYPES:
        parts = [REFERENCE.take_largest(make("normal", 1000, dtype, seed), None, 100) for seed in range(3)]
        for add in (False, True):
            outs = [make("normal", 1000, dtype, 9) for _ in range(2)]
            for kernels, out in zip((REFERENCE, FAST), outs, strict=True):
                kernels.sparse_mean([part[0] for part in parts], [part[1] for part in parts], out, add=add)
            # index_add may round a product and a sum at once.
            torch.testing.assert_close(outs[1], outs[0], rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
            dense = torch.zeros(1000, dtype=dtype)
            for values, indices in parts:
                dense[indices.long()] += values / 3
            start = make("normal", 1000, dtype, 9) if add else 0
            torch.testing.assert_close(outs[1], dense + start)


def chunks_of(size: int, chunk: int, ratio: float) -> Chunks:
    return Chunks(chunk, max(1, round(ratio * chunk)), max(1, round(ratio * (size % chunk))))


@pytest.mark.parametrize(
    ("chunk", "ratio", "value_bits"), [(16, 0.3, 2), (64, 0.05, None), (64, 1.0, 8), (4096, 0.01, 4), (4096, 0.3, 16)]
)
def test_take_largest_of_chunks(samples: Iterator[Sample], chunk: int, ratio: float, value_bits: int | None) -> None:
    for sample in samples:
        total, size = total_of(sample), len(sample[0])
        chunks = chunks_of(size, chunk, ratio)
        reference, fast = both("take_largest_of_chunks", sample, chunks, value_bits)
        assert_same(reference, fast)
        *entries, new_residual = fast
        check_entries(Entries(*entries), total, new_residual, chunks, value_bits)


def check_entries(
    entries: Entries, total: torch.Tensor, new_residual: torch.Tensor | None, chunks: Chunks, value_bits: int | None
) -> None:
    """Check what is decoded by both backends against the largest entries, found anew."""
    for parts, add in itertools.product((1, 3), (False, True)):
        outs = [torch.ones_like(total) for _ in range(2)]
        for kernels, out in zip((REFERENCE, FAST), outs, strict=True):
            kernels.chunks_mean([entries] * parts, chunks, value_bits, out, add=add)
        assert torch.equal(*outs)
    REFERENCE.chunks_mean([entries], chunks, value_bits, out)
    if new_residual is not None:
        assert torch.equal(new_residual, total - out)
    for part, sent in zip(total.split(chunks.size), out.split(chunks.size), strict=True):
        kept = chunks.kept if len(part) == chunks.size else chunks.kept_of_rest
        largest = torch.zeros_like(part)
        positions = part.abs().sort(descending=True, stable=True).indices[:kept]
        largest[positions] = part[positions]
        # Nothing else is sent, and no error is larger than half a step, or half a unit of bfloat16's last digit.
        assert not sent[largest == 0].any()
        errors, magnitudes = (largest - sent).abs(), part[positions].abs()
        if value_bits == 16:
            assert (errors <= largest.abs() * 2.0**-8 + 2.0**-133).all()
        elif value_bits is None:
            assert not errors.any()
        else:
            step = (magnitudes.max() - magnitudes.min()) / (2 ** (value_bits - 1) - 1)
            assert (errors <= 0.501 * step + 4 * torch.finfo(part.dtype).eps * magnitudes.max()).all()


def test_chunks_take_the_first_of_equals_and_fit_any_scale() -> None:
    grad = torch.ones(3 * 4096)
    grad[4096:8192] = 1e-30 * make("normal", 4096, torch.float32)
    grad[8192:8200] = 1e30
    for kernels in (REFERENCE, FAST):
        entries = kernels.take_largest_of_chunks(grad, None, Chunks(4096, 20, 0), None)
        positions = unpack(entries.positions, 60, POSITION_BITS).view(3, 20)
        assert positions[0].tolist() == [*range(20)]
        assert positions[2].tolist() == [*range(20)]
        assert positions[1].tolist() == sorted(grad[4096:8192].abs().topk(20).indices.tolist())


@pytest.mark.parametrize("value_bits", [None, 4, 16])
def test_chunks_with_nan_or_inf_are_of_the_same_size(value_bits: int | None) -> None:
    """The step will be skipped, but other ranks count on the size."""
    for spoilt, stride in itertools.product((math.nan, math.inf), (1, 50)):
        grad = make("normal", 5000, torch.float32)
        grad[::stride] = spoilt
        chunks = chunks_of(5000, 4096, 0.01)
        for kernels in (REFERENCE, FAST):
            entries = kernels.take_largest_of_chunks(
                total := grad.clone(), Feedback.in_place(total), chunks, value_bits
            )
            positions = unpack(entries.positions, chunks.count(5000), POSITION_BITS)
            assert (positions[:41].diff() > 0).all()
            assert ((positions >= 0) & (positions < 4096)).all()
            assert (positions[41:] < 5000 - 4096).all()


def test_bfloat16_values_never_overflow() -> None:
    largest = torch.finfo(torch.float32).max
    grad = torch.tensor([largest, -largest, 1 + 2**-8, 1 + 3 * 2**-8] * 4)  # ties are rounded to even
    for kernels, dtype in itertools.product((REFERENCE, FAST), DTYPES):
        entries = kernels.take_largest_of_chunks(grad.to(dtype), None, Chunks(16, 16, 0), 16)
        bound = torch.finfo(torch.bfloat16).max
        assert entries.values[:4].tolist() == [bound, -bound, 1, 1 + 2**-6]


@pytest.mark.parametrize("seed", [None, 123456789012345])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_quantize(samples: Iterator[Sample], bits: int, seed: int | None) -> None:
    for sample in samples:
        reference, fast = both("quantize", sample, bits, BLOCK, seed)
        (codes, scales, new_residual), size = fast, len(sample[0])
        assert torch.equal(reference[0], codes)
        assert torch.equal(reference[1], scales)
        assert codes.numel() == math.ceil(size / BLOCK) * BLOCK * bits // 8
        decoded = check_dequantize(codes, scales, bits, sample[0])
        if new_residual is not None:
            # One backend may multiply and subtract at once, the other may round in between.
            largest = total_of(sample).abs().max()
            torch.testing.assert_close(
                new_residual, reference[2], rtol=0, atol=float(largest * torch.finfo(new_residual.dtype).eps)
            )
            torch.testing.assert_close(
                decoded + new_residual,
                total_of(sample),
                rtol=0,
                atol=float(2 * largest * torch.finfo(new_residual.dtype).eps),
            )


def factors_for(like: torch.Tensor) -> torch.Tensor:
    """Return powers of two, so that products are exact."""
    return torch.ldexp(torch.ones_like(like), torch.arange(len(like)) % 5 - 2)


def check_dequantize(codes: torch.Tensor, scales: torch.Tensor, bits: int, like: torch.Tensor) -> torch.Tensor:
    """Compare both backends on one payload, three of one tensor and three scattered ones; return one decoded."""
    for parts, add, factors in itertools.product((1, 3), (False, True), (None, factors_for(like))):
        outs = [torch.ones_like(like) for _ in range(2)]
        for kernels, out in zip((REFERENCE, FAST), outs, strict=True):
            many = list(torch.stack([codes] * parts)) if parts == 3 and add else [codes.clone()] * parts
            kernels.dequantize_mean(many, [scales] * parts, bits, BLOCK, out, add=add, factors=factors)
        torch.testing.assert_close(outs[1], outs[0], rtol=4 * torch.finfo(like.dtype).eps, atol=0)
    REFERENCE.dequantize_mean([codes], [scales], bits, BLOCK, out)
    return out


def test_natural(samples: Iterator[Sample]) -> None:
    for sample in samples:
        for seed in (0, 987654321012345):
            reference, fast = both("natural", sample, BLOCK, seed)
            assert_same(reference, fast)
            codes, scales, new_residual = fast
            decoded = [torch.full_like(sample[0], math.nan) for _ in range(2)]
            for kernels, out in zip((REFERENCE, FAST), decoded, strict=True):
                kernels.natural_mean([codes, codes, codes], [scales] * 3, BLOCK, out)
            assert torch.equal(*decoded)
            for kernels, out in zip((REFERENCE, FAST), decoded, strict=True):
                kernels.natural_mean([codes], [scales], BLOCK, out, add=True)
            # One backend may multiply and add at once.
            torch.testing.assert_close(decoded[1], decoded[0], rtol=4 * torch.finfo(out.dtype).eps, atol=0)
            FAST.natural_mean([codes], [scales], BLOCK, decoded[0])
            mantissas, _ = torch.frexp(decoded[0].abs())
            assert ((mantissas == 0.5) | (mantissas == 0)).all()
            assert new_residual is None or torch.equal(total_of(sample) - decoded[0], new_residual)


def test_sign(samples: Iterator[Sample]) -> None:
    for sample in samples:
        (bits, scales, new_residual), fast = both("sign", sample, BLOCK)
        assert torch.equal(bits, fast[0])
        # Sums of BLOCK positive numbers in another order.
        tolerance = BLOCK * torch.finfo(scales.dtype).eps
        torch.testing.assert_close(fast[1], scales, rtol=tolerance, atol=torch.finfo(scales.dtype).smallest_normal)
        total = total_of(sample)
        if new_residual is not None:
            largest = float(total.abs().max())
            torch.testing.assert_close(fast[2], new_residual, rtol=0, atol=2 * tolerance * largest)
        outs = [torch.full_like(total, math.nan) for _ in range(2)]
        for kernels, out in zip((REFERENCE, FAST), outs, strict=True):
            kernels.sign_mean([bits, bits, bits], [scales, scales, 2 * scales], BLOCK, out)
        torch.testing.assert_close(outs[1], outs[0], rtol=4 * torch.finfo(total.dtype).eps, atol=0)
        assert ((outs[1] < 0) == ((total < 0) & (outs[1] != 0))).all()
        mean, factors = outs[0], factors_for(total)
        for kernels, add in itertools.product((REFERENCE, FAST), (False, True)):
            out = torch.ones_like(total)
            kernels.sign_mean([bits, bits, bits], [scales, scales, 2 * scales], BLOCK, out, add=add, factors=factors)
            expected = mean * factors + (1 if add else 0)
            torch.testing.assert_close(out, expected, rtol=4 * torch.finfo(total.dtype).eps, atol=0)


def test_sign_and_level(samples: Iterator[Sample]) -> None:
    for sample in samples:
        total = total_of(sample)
        reference, fast = both("sign_and_level", sample, BLOCK)
        tolerance = 2 * BLOCK * torch.finfo(total.dtype).eps  # sums of BLOCK numbers in another order
        magnitudes, sent = total.abs(), [torch.full_like(total, math.nan) for _ in range(2)]
        for (codes, scales, new_residual), out in zip((reference, fast), sent, strict=True):
            assert codes.numel() == math.ceil(len(total) / BLOCK) * BLOCK // 4
            assert scales.numel() == math.ceil(len(total) / BLOCK) * 2
            REFERENCE.sign_and_level_mean([codes], [scales], BLOCK, out)
            assert new_residual is None or torch.equal(new_residual, total - out)
            assert ((out < 0) == ((total < 0) & (out != 0))).all()
        for part, of_reference, of_fast in zip(
            magnitudes.split(BLOCK), sent[0].split(BLOCK), sent[1].split(BLOCK), strict=True
        ):
            # A magnitude next to the mean may be on either side of it.
            mean, largest = float(part.double().mean()), float(part.max())
            near = (part.double() - mean).abs() <= tolerance * largest
            upper = part.double() > mean
            for out in (of_reference.abs().double(), of_fast.abs().double()):
                for level in (upper & ~near, ~upper & ~near):
                    if level.any() and not near.any():
                        expected = part[level].double().mean().expand(int(level.sum()))
                        smallest = torch.finfo(total.dtype).smallest_normal
                        torch.testing.assert_close(out[level], expected, rtol=tolerance, atol=smallest)
            if near.all():
                torch.testing.assert_close(of_fast, of_reference, rtol=tolerance, atol=0)
        codes, scales, _ = reference
        for parts, add in itertools.product((1, 3), (False, True)):
            outs = [torch.ones_like(total) for _ in range(2)]
            for kernels, out in zip((REFERENCE, FAST), outs, strict=True):
                many = list(torch.stack([codes] * parts)) if add else [codes.clone()] * parts
                kernels.sign_and_level_mean(many, [scales] * parts, BLOCK, out, add=add)
            assert torch.equal(*outs)


def test_sign_vote(samples: Iterator[Sample]) -> None:
    for sample in samples:
        total = total_of(sample)
        voters = [REFERENCE.sign(part, None, BLOCK)[0] for part in (total, -total, total.roll(1))]
        weights = [torch.full((math.ceil(len(total) / BLOCK),), weight, dtype=total.dtype) for weight in (1.5, 0, 1)]
        for count in (1, 2, 3):
            for add in (False, True):
                outs = [torch.full_like(total, 7.0) for _ in range(2)]
                for kernels, out in zip((REFERENCE, FAST), outs, strict=True):
                    kernels.sign_vote(voters[:count], weights[:count], BLOCK, out, add=add)
                expected = torch.where(total < 0, -1.0, 1.0) + (7.0 if add else 0.0)  # the first outweighs the third
                assert torch.equal(outs[0], expected.to(total.dtype))
                assert torch.equal(outs[1], outs[0])


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (7, 3), (9, 64), (3, 65), (40, 130), (0, 5), (5, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_means(shape: tuple[int, int], dtype: torch.dtype) -> None:
    numel = shape[0] * shape[1]
    for kind, start in itertools.product(KINDS, (0, 1, 63, 70)):
        flat = make(kind, start + numel + 5, dtype) if numel else torch.ones(start + 5, dtype=dtype)
        bits, _ = REFERENCE.sign(flat, None, BLOCK)
        matrix = flat[start : start + numel].view(shape)
        results = []
        for kernels in (REFERENCE, FAST):
            new_residual, sent = matrix.clone(), torch.ones(shape, dtype=dtype)
            means = kernels.take_two_means(new_residual)
            kernels.add_two_means(bits, BLOCK, start, means, sent)
            largest = float(matrix.abs().max()) if numel else 0.0
            tolerance = 4 * (1 + largest) * torch.finfo(dtype).eps
            torch.testing.assert_close(sent - 1 + new_residual, matrix, rtol=0, atol=tolerance)
            # The means are right if what they miss sums to nothing on either side.
            missed = torch.stack(
                [torch.where(matrix < 0, new_residual, 0).sum(1), torch.where(matrix < 0, 0, new_residual).sum(1)]
            )
            torch.testing.assert_close(missed, torch.zeros_like(missed), rtol=0, atol=shape[1] * tolerance)
            results.append((means, new_residual, sent))
        for reference, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, reference, rtol=0, atol=shape[1] * tolerance)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    values=st.lists(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=1, max_size=300),
    bits=st.integers(2, 8),
    blocks=st.sampled_from([16, 32, 512]),
)
def test_any_floats_quantize_identically(values: list[float], bits: int, blocks: int) -> None:
    grad = torch.tensor(values)
    for seed in (None, 5):
        reference, fast = (kernels.quantize(grad, None, bits, blocks, seed) for kernels in (REFERENCE, FAST))
        assert_same(reference, fast)
        assert sum(widths(bits)) == bits
    assert_same(*(kernels.natural(grad, None, blocks, 5) for kernels in (REFERENCE, FAST)))
    assert_same(*(kernels.take_largest(grad, None, len(values)) for kernels in (REFERENCE, FAST)))
    chunks = chunks_of(len(values), blocks, bits / 16)
    for value_bits in (None, 2, 8, 16):
        assert_same(*(kernels.take_largest_of_chunks(grad, None, chunks, value_bits) for kernels in (REFERENCE, FAST)))
