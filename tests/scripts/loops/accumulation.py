"""Loops in which a step has several backward passes, or none."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.nn.functional import mse_loss

from tests.scripts.nets import mlp
from tests.scripts.registry import loop


@loop(telescopes=True)
def accumulation(world: Any) -> Any:
    """Every pass is exchanged."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    optimizer.zero_grad()
    for index, (x, y) in enumerate(world.batches(6), 1):
        (mse_loss(model(x), y) / 2).backward()
        if index % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


@loop(engines=("mpi", "horovod"), telescopes=True)
def accumulation_no_sync(world: Any) -> Any:
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    optimizer.zero_grad()
    for index, (x, y) in enumerate(world.batches(6), 1):
        is_last = index % 3 == 0
        with contextlib.nullcontext() if is_last else optimizer.no_sync():
            (mse_loss(model(x), y) / 3).backward()
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
    return model


@loop(telescopes=True)
def accumulation_uneven_end(world: Any) -> Any:
    """7 batches in windows of 3: the last window has one, which is the last of all."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    data = list(world.batches(7))
    optimizer.zero_grad()
    for index, (x, y) in enumerate(data, 1):
        is_last = index % 3 == 0 or index == len(data)
        with contextlib.nullcontext() if is_last else optimizer.no_sync():
            (mse_loss(model(x), y) / 3).backward()
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
    return model


@loop()
def accumulation_clipped(world: Any) -> Any:
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    norms = []
    for window in range(3):
        for index, (x, y) in enumerate(world.batches(3, seed=10 * window)):
            with contextlib.nullcontext() if index == 2 else optimizer.no_sync():
                (mse_loss(model(x), 20 * y) / 3).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
    return model, norms


@loop(telescopes=True)
def two_losses(world: Any) -> Any:
    """Two backward passes over two forward passes, gradients looked at in between."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    norms = []
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.synchronize()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]))
        model(x).square().mean().backward()
        optimizer.step()
    return model, norms


@loop(without_ddp="it exchanges one backward pass a forward pass")
def retained_graph(world: Any) -> Any:
    """Two losses of one forward pass: backward twice through one graph."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    for x, y in world.batches():
        optimizer.zero_grad()
        out = model(x)
        mse_loss(out, y).backward(retain_graph=True)
        out.square().mean().backward()
        optimizer.step()
    return model


@loop()
def step_without_backward(world: Any) -> Any:
    """Gradients of None, then of zero, which weight decay and momentum tell apart."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), model)
    optimizer.step()
    for x, y in world.batches():
        mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
    for x, y in world.batches(2, seed=9):
        mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    return model


@loop()
def backward_without_step(world: Any) -> Any:
    """Gradients are looked at and dropped: a first pass to warm up, an analysis of layers."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    seen = []
    for step, (x, y) in enumerate(world.batches(6)):
        mse_loss(model(x), y).backward()
        seen.append(torch.stack([p.grad.norm() for p in model.parameters()]))
        if step % 2:
            optimizer.step()
        model.zero_grad()
    return model, seen


@loop()
def zeroed_in_place(world: Any) -> Any:
    """The habit of older scripts: gradients stay allocated."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    for step, (x, y) in enumerate(world.batches(6)):
        if step % 3 == 0:
            optimizer.zero_grad(set_to_none=False)
        elif step % 3 == 1:
            model.zero_grad(set_to_none=False)
        else:
            for parameter in model.parameters():
                parameter.grad.zero_()
        mse_loss(model(x), y).backward()
        optimizer.step()
    return model


@loop(telescopes=True)
def never_zeroed_by_optimizer(world: Any) -> Any:
    """p.grad = None, parameter by parameter."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for x, y in world.batches():
        for parameter in model.parameters():
            parameter.grad = None
        mse_loss(model(x), y).backward()
        optimizer.step()
    return model


@loop()
def inner_steps(world: Any) -> Any:
    """Two phases a batch on the same data, as in PPO's epochs."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.Adam(model.parameters(), lr=0.01), model)
    for x, y in world.batches():
        with torch.no_grad():
            before = model(x)
        for _ in range(2):
            optimizer.zero_grad()
            out = model(x)
            (mse_loss(out, y) + 0.1 * mse_loss(out, before)).backward()
            optimizer.step()
    return model
