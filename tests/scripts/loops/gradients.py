"""Loops that look at gradients, or change them, between backward and step."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import mse_loss

from tests.scripts.nets import mlp
from tests.scripts.registry import loop

ALL_ENGINES = ("mpi", "horovod")


@loop(engines=ALL_ENGINES, telescopes=True)
def plain_steps(world: Any) -> Any:
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for x, y in world.batches(6):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    return model


@loop(engines=ALL_ENGINES)
def clip_by_norm(world: Any) -> Any:
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    norms = []
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(model(5 * x), 50 * y).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
    return model, norms


@loop()
def clip_by_value(world: Any) -> Any:
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.Adam(model.parameters(), lr=0.01), model)
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(model(x), 10 * y).backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)
        optimizer.step()
    return model


@loop(engines=ALL_ENGINES)
def masked_rows(world: Any) -> Any:
    """Pruned rows, which must stay as they are."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        for parameter in model.parameters():
            parameter.grad[0] = 0
        optimizer.step()
    return model


@loop()
def gradient_noise(world: Any) -> Any:
    """Langevin dynamics: all ranks draw the same noise."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    generator = torch.Generator().manual_seed(7)
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        for parameter in model.parameters():
            parameter.grad += 0.1 * torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return model


@loop()
def replaced_gradients(world: Any) -> Any:
    """A new tensor in place of the gradient: its sign, and none at all for one parameter."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1), model)
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        for parameter in model.parameters():
            parameter.grad = parameter.grad.clamp(-0.01, 0.01).clone()
        next(iter(model.parameters())).grad = None
        optimizer.step()
    return model


@loop(telescopes=True)
def logged_norms(world: Any) -> Any:
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    log = []
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        log.append(torch.stack([parameter.grad.norm() for parameter in model.parameters()]))
        optimizer.step()
    return model, log


@loop()
def centralized_gradients(world: Any) -> Any:
    """Gradient centralization, in place, before an adaptive optimizer."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        for parameter in model.parameters():
            if parameter.grad.dim() > 1:
                parameter.grad.sub_(parameter.grad.mean(1, keepdim=True))
        optimizer.step()
    return model


@loop()
def adaptive_clipping(world: Any) -> Any:
    """Each parameter's gradient is bounded by a share of its weight's norm."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True), model)
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(model(x), 20 * y).backward()
        for parameter in model.parameters():
            limit = 0.05 * parameter.detach().norm().clamp(min=1e-3)
            parameter.grad.mul_((limit / parameter.grad.norm()).clamp(max=1.0))
        optimizer.step()
    return model


@loop(engines=ALL_ENGINES)
def dropped_batches(world: Any) -> Any:
    """A batch whose gradient is too long is dropped by all ranks, as they see the same norm."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for step, (x, y) in enumerate(world.batches(6)):
        optimizer.zero_grad()
        mse_loss(model(x), y * (100 if step % 3 == 1 else 1)).backward()
        norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
        if norm > 5:
            optimizer.zero_grad()
            continue
        optimizer.step()
    return model


@loop(compressors=())
def gradients_set_by_hand(world: Any) -> Any:
    """torch.func: no backward, so nothing that sees it; the script averages, and step takes .grad as it is."""
    model = mlp()
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    weights = dict(model.named_parameters())
    for step in range(3):
        whole = [tensor for rank in range(world.size) for tensor in [world.sample(step, rank)]]
        x, y = (torch.cat(parts) for parts in zip(*whole, strict=True))

        def loss(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return mse_loss(torch.func.functional_call(model, weights, (x,)), y)

        optimizer.zero_grad()
        detached = {name: weight.detach() for name, weight in weights.items()}
        for name, grad in torch.func.grad(loss)(detached, x, y).items():
            weights[name].grad = grad
        optimizer.step()
    return model
