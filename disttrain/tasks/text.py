"""Byte-level language modeling of any text with a small GPT.

The default text is the source code of the Python standard library: real text that is on every machine.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn
from torch.utils.data import Dataset

from disttrain.errors import UserError
from disttrain.tasks import text_files
from disttrain.tasks.base import Task

logger = logging.getLogger(__name__)


class Text(Task):
    """Byte-level language modeling.

    Whole files are held out, chosen by a hash of their path. If that leaves too little to train on or to hold out, as
    with a single file, the end of each file is held out instead.
    """

    path: str | None = Field(
        default=None,
        description="a folder (all files in it), a file, or a glob; 'package:sklearn/datasets/descr/*.rst': in an "
        "installed package; null: the standard library's .py files",
    )
    held_out: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="fraction of the files held out for evaluation; with very few files, of the end of each",
    )
    eval_windows: int | None = Field(
        default=1024,
        ge=1,
        description="windows to evaluate on, spread evenly over the held-out text; null: all",
    )
    context: int = Field(default=128, ge=2, description="bytes per sample")
    width: int = Field(default=128, ge=1)
    heads: int = Field(default=4, ge=1)
    layers: int = Field(default=4, ge=1)
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout of embeddings, attention and residual branches"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of each target spread over all bytes, in the training loss only"
    )

    @model_validator(mode="after")
    def _check(self) -> Text:
        if self.width % self.heads:
            raise UserError(f"task.width={self.width} must be a multiple of task.heads={self.heads}")
        return self

    def build_model(self) -> nn.Module:
        return GPT(self.context, self.width, self.heads, self.layers, self.dropout)

    def train_data(self) -> Dataset[Any]:
        return Windows(self._split[0], self.context)

    def eval_data(self) -> Dataset[Any]:
        return Windows(self._split[1], self.context, self.eval_windows)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        inputs, targets = _next_bytes(batch)
        scores = model(inputs).flatten(0, 1)
        return F.cross_entropy(scores, targets.flatten(), label_smoothing=self.label_smoothing)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[torch.Tensor | float, int]]:
        inputs, targets = _next_bytes(batch)
        nats = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
        return {"bits_per_byte": (nats / math.log(2), targets.numel()), "loss": (nats, targets.numel())}

    @cached_property
    def _split(self) -> tuple[bytes, bytes]:
        """Training text and held-out text; files are in the order of their paths."""
        files = text_files.read(text_files.find(self.path))
        train, held_out = text_files.split_by_file(files, self.held_out)
        if min(len(train), len(held_out)) <= self.context:
            train, held_out = text_files.split_within(files, self.held_out)
            logger.info(
                "task.path=%r has too few files to hold out whole ones: the last %g of each is held out",
                self.path,
                self.held_out,
            )
        for text, which in ((train, "train on"), (held_out, "hold out")):
            if len(text) <= self.context:
                raise UserError(
                    f"task.path={self.path!r} has {len(text)} bytes to {which}, too few for one window of "
                    f"{self.context + 1}: add text, or change task.held_out={self.held_out} or task.context"
                )
        return train, held_out


class Windows(Dataset[torch.Tensor]):
    """Windows of ``context + 1`` bytes at a distance of ``context``, so that each byte but the first is predicted once.

    A batch is an int64 tensor of shape (samples, context + 1), taken in one indexing operation.
    """

    def __init__(self, text: bytes, context: int, limit: int | None = None) -> None:
        self._bytes = np.frombuffer(text, dtype=np.uint8)
        count = (len(text) - 1) // context
        kept = count if limit is None else min(count, limit)
        self._starts = np.arange(kept, dtype=np.int64) * count // kept * context
        self._span = np.arange(context + 1)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self._bytes[self._starts[indices, None] + self._span].astype(np.int64))


def _next_bytes(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return batch[:, :-1], batch[:, 1:]


class GPT(nn.Module):
    """A decoder-only transformer over bytes (Radford et al. 2019): pre-norm blocks, learned positions, tied output.

    Maps int64 tokens of shape (samples, length), with at most ``context`` tokens, to logits of shape (samples, length,
    256).
    """

    def __init__(self, context: int, width: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                # The residual stream adds up 2 * layers branches: scale each, so that their sum keeps its variance.
                branches = 2 * layers if name.endswith("out.weight") else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(branches))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.tokens(tokens) + self.positions[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


class Block(nn.Module):
    """Causal self-attention, then a two-layer MLP, both with a residual connection."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm, self.attention_in = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_norm, self.feed_in = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.feed_out = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples, length, width = x.shape
        dropout = self.dropout if self.training else 0.0
        parts = self.attention_in(self.attention_norm(x)).view(samples, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        x = x + F.dropout(self.attention_out(mixed.transpose(1, 2).reshape(x.shape)), dropout)
        return x + F.dropout(self.feed_out(F.gelu(self.feed_in(self.feed_norm(x)))), dropout)
