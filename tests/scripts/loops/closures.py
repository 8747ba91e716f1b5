"""Loops whose gradient is taken more than once a step: closures, SAM, LBFGS, derivatives of derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import mse_loss

from tests.scripts.nets import mlp
from tests.scripts.registry import loop


@loop(telescopes=True)
def closure(world: Any) -> Any:
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for x, y in world.batches():

        def evaluate(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(evaluate)
    return model


@loop()
def closure_that_clips(world: Any) -> Any:
    """As torch's documentation advises; it returns a number."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.Adam(model.parameters(), lr=0.01), model)
    for x, y in world.batches():

        def evaluate(x: torch.Tensor = x, y: torch.Tensor = y) -> float:
            optimizer.zero_grad()
            loss = mse_loss(model(x), 10 * y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            return loss.item()

        optimizer.step(evaluate)
    return model


@loop(without_ddp="LBFGS takes its decisions by this rank's own loss there", engines=("mpi", "horovod"))
def lbfgs(world: Any) -> Any:
    model = mlp()
    optimizer = world.wrap(torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, history_size=3), model)
    for x, y in world.batches(3):

        def evaluate(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(evaluate)
    return model


@loop(without_ddp="LBFGS takes its decisions by this rank's own loss there", compressors=("topk", "powersgd", "fp16"))
def lbfgs_line_search(world: Any) -> Any:
    model = mlp()
    options = {"max_iter": 3, "line_search_fn": "strong_wolfe"}
    optimizer = world.wrap(torch.optim.LBFGS(model.parameters(), **options), model)
    x, y = next(iter(world.batches(1)))

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(evaluate)
    return model


def climb(model: torch.nn.Module, rho: float = 0.05) -> list[torch.Tensor]:
    """Go to the worst place nearby, as SAM does; what was added."""
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        moves = [p.grad * (rho / norm) for p in model.parameters()]
        for parameter, move in zip(model.parameters(), moves, strict=True):
            parameter.add_(move)
    return moves


def descend(model: torch.nn.Module, moves: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, move in zip(model.parameters(), moves, strict=True):
            parameter.sub_(move)


@loop(engines=("mpi", "horovod"))
def sharpness_aware(world: Any) -> Any:
    """SAM: the gradient at the worst place nearby, which the mean gradient points to."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        moves = climb(model)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        descend(model, moves)
        optimizer.step()
    return model


@loop()
def sharpness_aware_by_closure(world: Any) -> Any:
    """SAM with the second pass in a closure."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for x, y in world.batches():
        model.zero_grad()
        mse_loss(model(x), y).backward()
        moves = climb(model)

        def evaluate(x: torch.Tensor = x, y: torch.Tensor = y, moves: list[torch.Tensor] = moves) -> torch.Tensor:
            model.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            descend(model, moves)
            return loss

        optimizer.step(evaluate)
    return model


@loop()
def adversarial_weights(world: Any) -> Any:
    """Two gradients a step are added up at two places (FGM): no zero_grad in between."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        weight = next(iter(model.parameters()))
        move = 0.1 * weight.grad / weight.grad.norm()
        with torch.no_grad():
            weight += move
        mse_loss(model(x), y).backward()
        with torch.no_grad():
            weight -= move
        optimizer.step()
    return model


@loop(without_ddp="it cannot be differentiated twice")
def create_graph(world: Any) -> Any:
    """backward(create_graph=True), as second-order methods call it."""
    model = mlp()
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.05), model)
    for x, y in world.batches(3):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward(create_graph=True)
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad = None
    return model


@loop(without_ddp="it cannot be differentiated twice")
def gradient_norm_penalty(world: Any) -> Any:
    """A loss that holds this rank's own gradient, by torch.autograd.grad."""
    model = mlp()
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.05), model)
    for step in range(3):
        optimizer.zero_grad()
        for rank in world.ranks:
            x, y = world.sample(step, rank)
            loss = mse_loss(model(x), y)
            grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            penalty = torch.stack([grad.square().sum() for grad in grads]).sum()
            ((loss + 0.1 * penalty) / len(world.ranks)).backward()
        optimizer.step()
    return model
