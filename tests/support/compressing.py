"""What the tests of compressors share: cases from the registry, buckets, gradients, committed steps in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from disttrain import DistributedOptimizer, compression
from disttrain.collectives import Collective
from disttrain.compression import Bucket, Compressor, State
from tests.support.lockstep import lockstep

Shapes = tuple[tuple[int, ...], ...]
Gradients = Callable[[int, int, int, torch.dtype], torch.Tensor]  # of (step, rank, numel, dtype)

SHAPES: Shapes = ((16, 40), (40,), (8, 3, 3, 3), (), (64, 1), (5, 7))
# The options with which each compressor is put through the contract; one that is new is tested with its defaults.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "topk": [
        {"ratio": 0.05},
        {"ratio": 1.0},
        {"ratio": 0.2, "error_feedback": False},
        {"ratio": 0.1, "exchange": "two_stage"},
        {"ratio": 0.1, "exchange": "two_stage", "mean_bits": 4},
        {"ratio": 0.1, "selection": "estimated"},
        {"ratio": 0.1, "chunk_size": 64},
        {"ratio": 0.2, "chunk_size": 4096, "value_bits": 16, "error_feedback": False},
        {"ratio": 0.1, "chunk_size": 64, "value_bits": 4, "exchange": "two_stage"},
        {"ratio": 0.1, "chunk_size": 48, "value_bits": 2, "ratio_ramp": {"start": 0.5, "steps": 3}},
    ],
    "threshold": [{"ratio": 0.1}, {"ratio": 0.2, "error_feedback": False}],
    "randomk": [
        {"ratio": 0.1},
        {"ratio": 0.3, "error_feedback": False},
        {"ratio": 0.3, "error_feedback": False, "scaled": True},
    ],
    "dgc": [
        {"ratio": 0.1},
        {"ratio": 0.1, "masking": False, "nesterov": True},
        {"ratio": 0.05, "clip_norm": 1.0, "warmup_steps": 3},
    ],
    "qsgd": [
        {"bits": 2, "block_size": 64},
        {"bits": 4},
        {"bits": 7, "error_feedback": True},
        {"exchange": "two_stage"},
        {"exchange": "two_stage", "mean_bits": 3},
    ],
    "terngrad": [{}, {"error_feedback": True, "block_size": 64}, {"clip": None, "exchange": "two_stage"}],
    "natural": [{}, {"error_feedback": True, "block_size": 64}, {"exchange": "two_stage"}],
    "efsign": [
        {},
        {"exchange": "two_stage", "block_size": 64},
        *({"exchange": "two_stage", "mean_bits": bits} for bits in (2, 3, 4, 8)),
        {"bits": 2, "block_size": 64},
        {"bits": 2, "exchange": "two_stage"},
    ],
    "signsgd": [{}, {"exchange": "two_stage", "block_size": 64}],
    "blockwise8": [{}, {"exchange": "two_stage", "block_size": 64}],
    "powersgd": [{"rank": 1}, {"rank": 4}, {"rank": 2, "alternating": True}],
    "fp16": [{}, {"error_feedback": True}],
    "bf16": [{}, {"error_feedback": True}],
}  # fmt: skip
CASES = [{"name": name, **options} for name in compression.names() for options in OPTIONS.get(name, [{}])]


def gradient_bytes(optimizer: DistributedOptimizer) -> int:
    """What this rank sent of gradients in the last step: without what the ranks say where they meet."""
    entries = optimizer.wire.entries
    return sum(entry.sent_bytes for entry in entries if entry.account.compressor != "agreement")


def case_id(case: dict[str, Any]) -> str:
    return ",".join(str(value) if key == "name" else f"{key}={value}" for key, value in case.items())


def make_bucket(rank: int, world_size: int, shapes: Shapes = SHAPES, dtype: torch.dtype = torch.float64) -> Bucket:
    names = tuple(f"layer{index}.weight" for index in range(len(shapes)))
    return Bucket(names, shapes, dtype, torch.device("cpu"), rank, world_size)


def gradient(step: int, rank: int, numel: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(numel, generator=generator, dtype=dtype)


@dataclass
class Ranks:
    """All ranks' compressor on one bucket."""

    compressor: Compressor
    buckets: list[Bucket]
    states: list[State]
    started: list[list[list[Collective]]] = field(default_factory=list)
    """By step and rank, the collectives."""

    @classmethod
    def make(
        cls, case: dict[str, Any], world_size: int, shapes: Shapes = SHAPES, dtype: torch.dtype = torch.float64
    ) -> Ranks:
        compressor = compression.build(case)
        buckets = [make_bucket(rank, world_size, shapes, dtype) for rank in range(world_size)]
        return cls(compressor, buckets, [compressor.init_state(bucket) for bucket in buckets])

    @property
    def numel(self) -> int:
        return self.buckets[0].numel

    def step(self, grads: Sequence[torch.Tensor], *, commit: bool = True) -> list[torch.Tensor]:
        """Every rank's mean."""
        outcomes = lockstep(
            [
                self.compressor.reduce(grad.clone(), bucket, state)
                for grad, bucket, state in zip(grads, self.buckets, self.states, strict=True)
            ]
        )
        means = [outcome.mean.clone() for outcome in outcomes]  # a new residual may lie in the same memory
        self.started.append([outcome.started for outcome in outcomes])
        if commit:
            for state, outcome in zip(self.states, outcomes, strict=True):
                state.commit(outcome.state)
        return means

    def steps(self, num_steps: int, gradients: Gradients = gradient, first: int = 0) -> list[list[torch.Tensor]]:
        """By step and rank, the means."""
        dtype = self.buckets[0].dtype
        return [
            self.step([gradients(step, rank, self.numel, dtype) for rank in range(len(self.buckets))])
            for step in range(first, first + num_steps)
        ]


def one_step(case: dict[str, Any], x: torch.Tensor, shapes: Shapes | None = None, step: int = 0) -> torch.Tensor:
    """What one rank without a residual makes of ``x``: C(x)."""
    ranks = Ranks.make(case, 1, shapes or ((x.numel(), 1),), x.dtype)
    ranks.states[0].step = step
    return ranks.step([x])[0]
