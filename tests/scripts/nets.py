"""Small models for loops, identical on all ranks, made without the process's own random generator."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
_SEEDING = threading.Lock()  # virtual ranks share one generator


def make(build: Callable[[], M], seed: int = 0) -> M:
    """Make a module whose initial weights depend on ``seed`` only."""
    with _SEEDING, torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def mlp(features: int = 8, width: int = 16, outputs: int = 4, seed: int = 0) -> nn.Sequential:
    return make(
        lambda: nn.Sequential(
            nn.Linear(features, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
        ),
        seed,
    )


class Branches(nn.Module):
    """A body, named branches that a step may or may not take, and a head."""

    def __init__(self, names: tuple[str, ...] = ("left", "right"), width: int = 8) -> None:
        super().__init__()
        self.body = nn.Linear(8, width)
        self.branches = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, *use: str) -> torch.Tensor:
        hidden = torch.tanh(self.body(x))
        for name in use:
            hidden = hidden + torch.tanh(self.branches[name](hidden))
        return self.head(hidden)
