"""Where data comes from, and what ranks have unequally much of: ragged batches, weights, episodes, uneven ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.scripts.nets import make, mlp
from tests.scripts.registry import loop
from tests.scripts.world import batch


def with_loader(world: Any, num_workers: int) -> Any:
    """DataLoader and DistributedSampler; in one process the ranks' loaders side by side."""
    data = TensorDataset(*batch(1, 24))
    samplers = [DistributedSampler(data, world.size, rank, shuffle=True, seed=3) for rank in world.ranks]
    loaders = [DataLoader(data, 4, sampler=sampler, num_workers=num_workers) for sampler in samplers]
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        for parts in zip(*loaders, strict=True):
            optimizer.zero_grad()
            for x, y in parts:
                (mse_loss(model(x), y) / len(parts)).backward()
            optimizer.step()
        scheduler.step()
    return model


@loop(engines=("mpi", "horovod"))
def sampler(world: Any) -> Any:
    return with_loader(world, 0)


@loop(without_threads="worker processes are forked", compressors=("topk",))
def loader_with_workers(world: Any) -> Any:
    return with_loader(world, 1)


def steps_of(rank: int) -> int:
    return 3 + 2 * (rank % 2)


def uneven(world: Any) -> Any:
    """What ``uneven_ends`` comes to: ranks that have ended take part with zeros."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(max(map(steps_of, range(world.size)))):
        optimizer.zero_grad()
        for rank in world.ranks:
            if step < steps_of(rank):
                x, y = world.sample(step, rank)
                (mse_loss(model(x), y) / world.size).backward()
        optimizer.step()
    return model


@loop(reference=uneven, without_ddp="it is a context manager there", engines=("mpi", "horovod"))
def uneven_ends(world: Any) -> Any:
    """Ranks with unequally many batches: who has run out joins the others' steps."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    (rank,) = world.ranks
    for step in range(steps_of(rank)):
        x, y = world.sample(step, rank)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    optimizer.join()
    return model


def two_uneven_epochs(world: Any) -> Any:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for epoch in range(2):
        for step in range(max(map(steps_of, range(world.size)))):
            optimizer.zero_grad()
            for rank in world.ranks:
                if step < steps_of(rank + epoch):
                    x, y = world.sample(10 * epoch + step, rank)
                    (mse_loss(model(x), y) / world.size).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
    return model


@loop(reference=two_uneven_epochs, without_ddp="it is a context manager there")
def uneven_epochs(world: Any) -> Any:
    """A join at the end of each epoch; another rank is the longer one in the second."""
    model = mlp()
    optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    (rank,) = world.ranks
    for epoch in range(2):
        for step in range(steps_of(rank + epoch)):
            x, y = world.sample(10 * epoch + step, rank)
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()
        optimizer.join()
    return model


def texts(step: int, rank: int) -> torch.Tensor:
    """Padded token sequences, of lengths that differ much; 0 is padding."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    lengths = torch.randint(2, 8 + 8 * rank, (4,), generator=generator)
    return nn.utils.rnn.pad_sequence(
        [torch.randint(1, 16, (int(length),), generator=generator) for length in lengths], batch_first=True
    )


def language_model() -> nn.Module:
    return make(lambda: nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16)))


@loop(engines=("mpi", "horovod"))
def token_means(world: Any) -> Any:
    """A mean over tokens that are no padding: ranks have unequally many."""
    model = world.wrap_model(language_model())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.5), model)
    for step in range(4):
        optimizer.zero_grad()
        for rank in world.ranks:
            tokens = texts(step, rank)
            target = tokens[:, 1:].flatten()
            loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), target, ignore_index=0)
            optimizer.scale(loss, weight=int((target != 0).sum())).backward()
        optimizer.step()
    return model


@loop(without_ddp="the weights of all passes must be known before the first there")
def token_means_accumulated(world: Any) -> Any:
    """The same over several passes a step, and clipped."""
    model = language_model()
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), model)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            for rank in world.ranks:
                tokens = texts(10 * step + part, rank)
                target = tokens[:, 1:].flatten()
                loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), target, ignore_index=0)
                optimizer.scale(loss, weight=int((target != 0).sum())).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3))
        optimizer.step()
    return model, norms


@loop(without_ddp="the weights of all passes must be known before the first there")
def token_means_no_sync(world: Any) -> Any:
    model = language_model()
    optimizer = world.wrap(torch.optim.Adam(model.parameters(), lr=0.02), model)
    for step in range(3):
        optimizer.zero_grad()
        with optimizer.no_sync():
            for rank in world.ranks:
                tokens = texts(10 * step, rank)
                target = tokens[:, 1:].flatten()
                loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), target, ignore_index=0)
                optimizer.scale(loss, weight=int((target != 0).sum())).backward()
        for rank in world.ranks:
            tokens = texts(10 * step + 1, rank)
            target = tokens[:, 1:].flatten()
            loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), target, ignore_index=0)
            optimizer.scale(loss, weight=int((target != 0).sum())).backward()
        optimizer.step()
    return model


@loop()
def class_weights(world: Any) -> Any:
    """cross_entropy(weight=...) divides by the sum of the weights of the classes at hand."""
    weights = torch.tensor([1.0, 5.0, 0.2, 2.0])
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for x, y in world.batches():
        classes = y.argmax(1)
        loss = cross_entropy(model(x), classes, weight=weights)
        optimizer.zero_grad()
        optimizer.scale(loss, weight=float(weights[classes].sum())).backward()
        optimizer.step()
    return model


@loop()
def episodes(world: Any) -> Any:
    """REINFORCE: episodes of unequal length, a loss that is a sum over their steps."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.Adam(model.parameters(), lr=0.01), model)
    for step in range(4):
        optimizer.zero_grad()
        for rank in world.ranks:
            states, rewards = world.sample(step, rank, rows=2 + (3 * rank + step) % 5)
            returns = rewards[:, 0].flip(0).cumsum(0).flip(0)
            chosen = model(states).log_softmax(1)[:, 0]
            (-(chosen * returns).sum() / len(world.ranks)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model


@loop()
def episodes_of_many_passes(world: Any) -> Any:
    """Unequally many backward passes a rank in one step: all under no_sync, and one exchange at the end."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for step in range(3):
        optimizer.zero_grad()
        with optimizer.no_sync():
            for rank in world.ranks:
                for part in range((step + rank) % 3):
                    x, y = world.sample(10 * step + part, rank)
                    (mse_loss(model(x), y) / len(world.ranks)).backward()
        for rank in world.ranks:
            x, y = world.sample(10 * step + 9, rank)
            (mse_loss(model(x), y) / len(world.ranks)).backward()
        optimizer.step()
    return model
