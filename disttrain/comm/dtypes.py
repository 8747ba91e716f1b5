"""Which dtypes engines know: few, and not the same ones. The communicator makes do with those that all of them have."""

from __future__ import annotations

from collections.abc import Callable

import torch

from disttrain.collectives import ReduceOp

# What only moves needs no type: it travels in one of the same width, or of a part of it.
_CARRIERS = {1: torch.uint8, 2: torch.uint8, 4: torch.int32, 8: torch.int64, 16: torch.int64}

_REDUCTIONS: dict[ReduceOp, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda rows: rows.sum(0),
    "mean": lambda rows: rows.div(len(rows)).sum(0),  # divided first: the sum might overflow
    "min": lambda rows: rows.amin(0),
    "max": lambda rows: rows.amax(0),
}

REDUCIBLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
REDUCIBLE |= {torch.uint8, torch.int8, torch.int32, torch.int64}
"""What engines add up. Other integers and floats are summed by exchange."""


def carrier(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, flat, as uint8, int32 or int64; a copy where it is not contiguous."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.view(-1).view(_CARRIERS[tensor.itemsize])


def reduce_rows(rows: torch.Tensor, op: ReduceOp) -> torch.Tensor:
    """Reduce over dimension 0 in a wider dtype, with one rounding."""
    return _REDUCTIONS[op](rows.float() if rows.is_floating_point() else rows.long()).to(rows.dtype)
