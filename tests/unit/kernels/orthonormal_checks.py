"""Rows that are hard to make orthonormal, and what must hold of the result: for every backend."""

from __future__ import annotations

import torch

from disttrain.kernels import Kernels
from disttrain.kernels.factors import join_factor, split_factor


def check_orthogonalize(kernels: Kernels, dtype: torch.dtype, device: torch.device, *, longest: int) -> None:
    """``longest``: the size of the longest rows, beside those of at most 50 entries."""
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    plain = randn(3, 50)
    dependent = torch.stack([plain[0], 2 * plain[0], plain[0] + plain[1]])
    with_zeros = torch.stack([torch.zeros_like(plain[0]), plain[1], torch.zeros_like(plain[0])])
    uneven = plain * torch.tensor([[1e-25], [1.0], [1e25]], dtype=dtype)
    inputs = [
        plain, dependent, with_zeros, torch.zeros_like(plain), torch.eye(3, dtype=dtype), plain * (info.max / 100),
        plain * info.tiny, -torch.ones(1, 1, dtype=dtype), uneven, randn(17, 17), 1 + randn(4, longest),
    ]  # fmt: skip
    sizes = [(len(each), each.shape[1]) for each in inputs]
    flat = join_factor(inputs).to(device)
    outputs = split_factor(kernels.orthogonalize(flat, sizes).cpu(), sizes)
    assert torch.equal(flat.cpu(), join_factor(inputs)), "what was given stays"
    for given, rows in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=dtype), rtol=0, atol=50 * info.eps)
        scaled = given / given.abs().max().clamp(min=info.tiny)
        tolerance = 100 * info.eps * max(1.0, float(scaled.norm()))
        torch.testing.assert_close(scaled @ rows.T @ rows, scaled, rtol=0, atol=tolerance)
