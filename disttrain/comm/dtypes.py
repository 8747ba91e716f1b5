"""Dtypes that engines support. Each supports only a few; other dtypes are sent or reduced by way of these."""

from __future__ import annotations

from collections.abc import Callable

import torch

from disttrain.collectives import ReduceOp

# By item size: data that is only moved, not reduced, is viewed as one of these.
_CARRIERS = {1: torch.uint8, 2: torch.uint8, 4: torch.int32, 8: torch.int64, 16: torch.int64}

_REDUCTIONS: dict[ReduceOp, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda rows: rows.sum(0),
    "mean": lambda rows: rows.div(len(rows)).sum(0),  # divide first: the sum could overflow
    "min": lambda rows: rows.amin(0),
    "max": lambda rows: rows.amax(0),
}

REDUCIBLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
REDUCIBLE |= {torch.uint8, torch.int8, torch.int32, torch.int64}
"""Dtypes that engines reduce, unless they say otherwise. Others are reduced by an all-to-all and an all-gather."""


def carrier(tensor: torch.Tensor) -> torch.Tensor:
    """View the tensor as flat uint8, int32 or int64. Copies it if it is not contiguous."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.view(-1).view(_CARRIERS[tensor.itemsize])


def reduce_rows(rows: torch.Tensor, op: ReduceOp) -> torch.Tensor:
    """Reduce over dimension 0 in a wider dtype, and round once."""
    return _REDUCTIONS[op](rows.float() if rows.is_floating_point() else rows.long()).to(rows.dtype)
