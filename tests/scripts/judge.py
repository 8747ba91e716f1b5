"""Checks of results: as in one process, identical on all ranks, finite, and no part of a gradient lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

Result = dict[str, torch.Tensor]
Numbers = Mapping[str, Mapping[str, torch.Tensor]]


class DifferenceError(AssertionError):
    """A loop ended with another result than expected."""


def flatten(returned: Any, prefix: str = "") -> Result:
    """Return all tensors that a loop returned, by name; of modules, the parameters."""
    if isinstance(returned, nn.Module):
        named = {name.replace("module.", "").replace("_orig_mod.", ""): p for name, p in returned.named_parameters()}
        return {f"{prefix}{name}": parameter.detach().clone() for name, parameter in named.items()}
    if isinstance(returned, Mapping):
        items = list(returned.items())
    elif isinstance(returned, list | tuple):
        items = list(enumerate(returned))
    else:
        return {f"{prefix}value": torch.as_tensor(returned).detach().clone()}
    return {name: tensor for key, part in items for name, tensor in flatten(part, f"{prefix}{key}.").items()}


def check_equal(result: Result, reference: Result, tolerance: float) -> None:
    if result.keys() != reference.keys():
        raise DifferenceError(f"other names than in one process: {sorted(result.keys() ^ reference.keys())[:3]}")
    far = {name: _distance(tensor, reference[name]) for name, tensor in result.items()}
    worst = max(far, key=lambda name: far[name])
    if far[worst] > tolerance:
        raise DifferenceError(f"{worst} differs from one process by {far[worst]:.3g} (allowed: {tolerance:.3g})")


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        return torch.inf
    if a.numel() == 0:
        return 0.0
    distance = (a.double() - b.double()).abs().max().item()
    return torch.inf if distance != distance else distance


def check_alike(results: Sequence[Result]) -> None:
    """Raise DifferenceError unless results are bit-identical on all ranks."""
    for rank, result in enumerate(results[1:], 1):
        for name, tensor in results[0].items():
            if name not in result or not torch.equal(tensor, result[name]):
                raise DifferenceError(f"{name} is not the same on ranks 0 and {rank}")


def check_finite(result: Result) -> None:
    for name, tensor in result.items():
        if not torch.isfinite(tensor).all():
            raise DifferenceError(f"{name} is not finite")


def check_balance(by_rank: Sequence[Numbers], tolerance: float = 1e-6) -> None:
    """Raise DifferenceError unless -(w_T - w_0) / lr + mean residual == mean sum of gradients, for each parameter."""
    for name, first in by_rank[0].items():
        shape = first["sum"].shape
        mean = torch.stack([numbers[name]["sum"] for numbers in by_rank]).double().mean(0)
        total = first["received"].double()
        if first["residual"].numel():
            total = total + torch.stack([numbers[name]["residual"] for numbers in by_rank]).double().mean(0).view(shape)
        servers = torch.cat([numbers[name]["server_residual"] for numbers in by_rank]).double()
        if servers.numel():
            total = total + servers.view(shape)
        error, size = (total - mean).norm().item(), mean.norm().item()
        if not error <= tolerance * max(size, 1.0):
            raise DifferenceError(f"{name}: sent and residual miss the sum of gradients by {error:.2g} of {size:.2g}")
