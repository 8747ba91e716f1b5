"""Clipping of mean gradients, on whole buckets where possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from disttrain.reduction.buckets.bucket import GradientBucket


def mean_gradients(buckets: Sequence[GradientBucket]) -> Iterator[torch.Tensor]:
    """Yield the mean gradients: whole buckets, or single gradients where the user has replaced some of a bucket."""
    for bucket in buckets:
        if bucket.holds_gradients:
            yield bucket.flat
        else:
            yield from (slot.parameter.grad for slot in bucket.slots if slot.parameter.grad is not None)


def clip_values_(gradients: Sequence[torch.Tensor], bound: float) -> None:
    """Clamp every element to [-bound, bound]."""
    for gradient in gradients:
        gradient.clamp_(-bound, bound)


def clip_norm_(gradients: Sequence[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale gradients so that their global 2-norm is at most ``max_norm``.

    Returns:
        The norm before, 0-d, in float32 at least.
    """
    if not gradients:
        return torch.tensor(0.0)
    wide = [torch.promote_types(gradient.dtype, torch.float32) for gradient in gradients]
    norms = [torch.linalg.vector_norm(one, dtype=dtype) for one, dtype in zip(gradients, wide, strict=True)]
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device, gradient.dtype))
    return total
