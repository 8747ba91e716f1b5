"""The GPU's kernels against the reference: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="triton is not installed")

from disttrain.kernels.cuda import CudaKernels  # noqa: E402
from disttrain.kernels.reference import Kernels  # noqa: E402

pytestmark = pytest.mark.timeout(300)  # the interpreter is slow
REFERENCE, KERNELS = Kernels(), CudaKernels()
DTYPES = [torch.float32, torch.float64]


def vector(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    values[: numel // 4] = 0
    return values.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 63, 64, 200])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", [None, 12345])
def test_quantize_is_the_reference(numel: int, bits: int, seed: int | None, dtype: torch.dtype) -> None:
    grad, residual = vector(numel, dtype, 0), vector(numel, dtype, 1)
    rests = torch.empty_like(grad), torch.empty_like(grad)
    codes, scales = REFERENCE.quantize(grad, residual, rests[0], bits, 64, seed)
    own_codes, own_scales = KERNELS.quantize(grad, residual, rests[1], bits, 64, seed)
    assert torch.equal(own_codes, codes)
    assert torch.equal(own_scales, scales)
    # One rounding of entries up to 4, where a product and a sum are fused.
    torch.testing.assert_close(rests[1], rests[0], rtol=0, atol=4 * torch.finfo(dtype).eps)
    outs = torch.ones_like(grad), torch.ones_like(grad)
    for add in (False, True):
        REFERENCE.dequantize_mean([codes, codes.flip(0)], [scales, scales], bits, 64, outs[0], add=add)
        KERNELS.dequantize_mean([codes, codes.flip(0)], [scales, scales], bits, 64, outs[1], add=add)
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 63, 64, 200])
@pytest.mark.parametrize("with_residual", [False, True])
def test_sign_is_the_reference(numel: int, with_residual: bool, dtype: torch.dtype) -> None:
    grad, residual = vector(numel, dtype, 0), vector(numel, dtype, 1) if with_residual else None
    rests = (torch.empty_like(grad), torch.empty_like(grad)) if with_residual else (None, None)
    bits, scales = REFERENCE.sign(grad, residual, rests[0], 64)
    own_bits, own_scales = KERNELS.sign(grad, residual, rests[1], 64)
    assert torch.equal(own_bits, bits)
    torch.testing.assert_close(own_scales, scales, rtol=1e-6, atol=0)
    if rests[0] is not None and rests[1] is not None:
        torch.testing.assert_close(rests[1], rests[0], rtol=1e-5, atol=1e-6)
    outs = torch.ones_like(grad), torch.ones_like(grad)
    for add in (False, True):
        REFERENCE.sign_mean([bits, bits.flip(0)], [scales, scales], 64, outs[0], add=add)
        KERNELS.sign_mean([bits, bits.flip(0)], [scales, scales], 64, outs[1], add=add)
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-6, atol=1e-7)
