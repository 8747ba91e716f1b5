"""How far a run has come, and what it has sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from disttrain.reduction import Ledger

WIRE = ("sent_bytes", "received_bytes", "dense_bytes")


@dataclass
class Progress:
    """How far a run has come, saved with it: steps and samples in all, and the position in the data.

    ``step_seconds`` is what steps took without evaluation and saving; ``wire`` the bytes of an average worker, in all
    and ``by_compressor``; ``learning_rate``, ``batch`` and ``health`` what these must know besides the step.
    """

    step: int = 0
    epoch: int = 0
    offset: int = 0
    samples: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    wire: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(WIRE, 0))
    learning_rate: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Any] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)


def bytes_of_a_worker(ledger: Ledger, before: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes of an average worker, in all and by compressor, with those ``before`` a resumption. A collective."""
    comm = ledger.comm
    parts = {"": ledger.total, **dict(sorted(ledger.by_compressor.items()))}  # in one order on all ranks
    rows = [[getattr(traffic, key) for key in WIRE] for traffic in parts.values()]
    means = (comm.all_reduce(torch.tensor(rows, device=comm.device)) // comm.world_size).tolist()
    now = {name: dict(zip(WIRE, row, strict=True)) for name, row in zip(parts, means, strict=True)}
    earlier = {"": before, **before.get("by_compressor", {})}
    sums = {
        name: {key: sum(part[name][key] for part in (earlier, now) if name in part) for key in WIRE}
        for name in {**earlier, **now}
    }
    return {**sums.pop(""), "by_compressor": sums}
