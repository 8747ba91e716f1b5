"""Models that are more than layers in a row: shared, parametrized, checkpointed, recurrent, sparse, compiled."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

from tests.scripts.nets import make, mlp
from tests.scripts.registry import loop


def train(world: Any, model: nn.Module, *, ddp: dict[str, Any] | None = None, steps: int = 4, lr: float = 0.1) -> Any:
    wrapped = world.wrap_model(model, **(ddp or {}))
    optimizer = world.wrap(torch.optim.SGD(wrapped.parameters(), lr=lr), wrapped)
    for x, y in world.batches(steps):
        optimizer.zero_grad()
        mse_loss(wrapped(x), y).backward()
        optimizer.step()
    return wrapped


class Tied(nn.Module):
    """One weight as embedding and as head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


@loop(telescopes=True, engines=("mpi", "horovod"))
def tied_weights(world: Any) -> Any:
    model = world.wrap_model(make(Tied))
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for step in range(4):
        tokens = torch.randint(0, 16, (12,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        cross_entropy(model(world.part(tokens)), world.part(tokens.roll(1))).backward()
        optimizer.step()
    return model


@loop(telescopes=True)
def one_layer_used_thrice(world: Any) -> Any:
    """Weights shared over depth, as in ALBERT."""
    layer = make(lambda: nn.Linear(8, 8))
    return train(world, nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer, nn.Tanh(), mlp()))


@loop(without_threads="parametrizations are cached process-wide while a forward pass runs")
def parametrised_weights(world: Any) -> Any:
    """Weight norm and orthogonality by torch.nn.utils.parametrizations."""

    def build() -> nn.Module:
        norm = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))
        return nn.Sequential(norm, nn.Tanh(), orthogonal, nn.Tanh(), nn.Linear(8, 4))

    return train(world, make(build), lr=0.05)


class Checkpointed(nn.Module):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.head, self.use_reentrant = nn.Linear(8, 4), use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant, preserve_rng_state=False)
        return self.head(x)


@loop(telescopes=True, engines=("mpi", "horovod"))
def checkpointing(world: Any) -> Any:
    return train(world, make(lambda: Checkpointed(use_reentrant=False)))


@loop(telescopes=True)
def checkpointing_reentrant(world: Any) -> Any:
    """Backward passes inside the backward pass; the input must ask for a gradient."""
    model = world.wrap_model(make(lambda: Checkpointed(use_reentrant=True)))
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(model(x.requires_grad_()), y).backward()
        optimizer.step()
    return model


def checkpointed_accumulation(world: Any, *, use_reentrant: bool) -> Any:
    model = world.wrap_model(make(lambda: Checkpointed(use_reentrant=use_reentrant)))
    optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    for window in range(3):
        for index, (x, y) in enumerate(world.batches(3, seed=10 * window)):
            with contextlib.nullcontext() if index == 2 else optimizer.no_sync():
                (mse_loss(model(x.requires_grad_()), y) / 3).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        optimizer.zero_grad()
    return model


@loop()
def checkpointing_no_sync(world: Any) -> Any:
    return checkpointed_accumulation(world, use_reentrant=False)


@loop()
def checkpointing_reentrant_no_sync(world: Any) -> Any:
    return checkpointed_accumulation(world, use_reentrant=True)


@loop(telescopes=True, without_ddp="it refuses a parameter whose gradient comes in two pieces")
def checkpointing_shared_layer(world: Any) -> Any:
    """One layer under two reentrant checkpoints: its gradient comes in two pieces within one backward pass."""
    layer = make(lambda: nn.Linear(8, 8))
    head = mlp()
    both = nn.ModuleDict({"layer": layer, "head": head})
    optimizer = world.wrap(torch.optim.SGD(both.parameters(), lr=0.1), both)
    for x, y in world.batches():
        optimizer.zero_grad()
        hidden = x.requires_grad_()
        for _ in range(2):
            hidden = torch.tanh(checkpoint(layer, hidden, use_reentrant=True, preserve_rng_state=False))
        mse_loss(head(hidden), y).backward()
        optimizer.step()
    return both


@loop(engines=("horovod",))
def truncated_bptt(world: Any) -> Any:
    """A recurrent network over chunks of a sequence; the hidden state is detached between them."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            out, state = self.rnn(x, state)
            return self.head(out), state

    model = world.wrap_model(make(Recurrent))
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        x = world.part(torch.randn(12, 9, 8, generator=generator))
        y = world.part(torch.randn(12, 9, 4, generator=generator))
        state = None
        for chunk in range(0, 9, 3):
            optimizer.zero_grad()
            out, state = model(x[:, chunk : chunk + 3], state)
            mse_loss(out, y[:, chunk : chunk + 3]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
            state = state.detach()
    return model


@loop(tolerance=1e-8, engines=("mpi", "horovod"))
def sparse_embedding(world: Any) -> Any:
    """nn.Embedding(sparse=True): each rank has gradients of the rows that it saw."""

    model = make(lambda: nn.Sequential(nn.Embedding(32, 8, sparse=True), nn.Linear(8, 4)))
    wrapped = world.wrap_model(model)
    optimizer = world.wrap(torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        tokens, y = torch.randint(0, 32, (12,), generator=generator), torch.randn(12, 4, generator=generator)
        optimizer.zero_grad()
        mse_loss(wrapped(world.part(tokens)), world.part(y)).backward()
        optimizer.step()
    return wrapped


@loop()
def channels_last(world: Any) -> Any:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 4))

    model = world.wrap_model(make(build).to(memory_format=torch.channels_last))
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(12, 3, 6, 6, generator=generator), torch.randn(12, 4, generator=generator)
        optimizer.zero_grad()
        mse_loss(model(world.part(x).to(memory_format=torch.channels_last)), world.part(y)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


COMPILES = "torch.compile keeps state of the whole process"


@loop(without_threads=COMPILES, compressors=("topk", "powersgd"))
def compiled_whole(world: Any) -> Any:
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    fast = torch.compile(model, backend="aot_eager")
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(fast(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model


@loop(without_threads=COMPILES, compressors=("topk",))
def compiled_before_wrapping(world: Any) -> Any:
    """The compiled module is what is wrapped; its names start with _orig_mod."""
    model = world.wrap_model(torch.compile(mlp(), backend="aot_eager"))
    optimizer = world.wrap(torch.optim.Adam(model.parameters(), lr=0.01), model)
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    return model


@loop(without_threads=COMPILES, compressors=("topk",))
def compiled_by_block(world: Any) -> Any:
    blocks = [make(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh()), seed) for seed in range(3)]
    for block in blocks:
        block.compile(backend="aot_eager")
    model = world.wrap_model(nn.Sequential(*blocks, mlp()))
    optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    for window in range(2):
        for index, (x, y) in enumerate(world.batches(2, seed=window)):
            with contextlib.nullcontext() if index else optimizer.no_sync():
                (mse_loss(model(x), y) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@loop(telescopes=True)
def hooks_on_gradients(world: Any) -> Any:
    """A user's own tensor hooks, which see this rank's gradients before they are averaged, and change them."""
    model = mlp()
    wrapped = world.wrap_model(model)
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: 2 * grad)
    optimizer = world.wrap(torch.optim.SGD(wrapped.parameters(), lr=0.05), wrapped)
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(wrapped(x), y).backward()
        optimizer.step()
    return wrapped
