"""The models that are timed, their batches and their optimizers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


class TransformerBlock(nn.Module):
    """Causal self-attention, then a feed-forward layer, both with pre-normalization and a residual connection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        query, key, value = self.qkv(self.norm_1(x)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = (
            F.scaled_dot_product_attention(query, key, value, is_causal=True)
            .transpose(1, 2)
            .reshape(batch, length, width)
        )
        x = x + self.out(mixed)
        fed: torch.Tensor = self.down(F.gelu(self.up(self.norm_2(x))))
        return x + fed


class GPT(nn.Module):
    """A GPT with tied embeddings; 7.6 M parameters by default."""

    def __init__(self, vocabulary: int = 5000, width: int = 256, num_layers: int = 8, length: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(TransformerBlock(width, num_heads=8) for _ in range(num_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: torch.Tensor = self.head(self.norm(self.layers(x)))
        return logits.flatten(0, 1)


def mlp(width: int = 1024, num_layers: int = 10) -> nn.Module:
    """Return square linear layers with ReLU between them; 10.5 M parameters by default."""
    layers = [layer for _ in range(num_layers) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "gpt": GPT}


def make_batch(model: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random inputs and targets, different on each rank and the same in every run."""
    generator = torch.Generator().manual_seed(1000 + rank)
    if model == "mlp":
        return torch.randn(32, 1024, generator=generator), torch.randint(1024, (32,), generator=generator)
    tokens = torch.randint(5000, (2, 65), generator=generator)
    return tokens[:, :-1], tokens[:, 1:].flatten()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {"sgd": sgd, "adamw": adamw}
