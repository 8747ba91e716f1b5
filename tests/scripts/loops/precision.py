"""Loops in half precision, with loss scaling, and with numbers gone bad."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

from tests.scripts.nets import make, mlp
from tests.scripts.registry import loop

RESIDUALS_IN_TRUE_UNITS = ("topk", "efsign", "powersgd", "fp16")


def scaled(world: Any, *, fused: bool = False, unscale: bool = False, accumulate: int = 1, bad: bool = False) -> Any:
    """torch.amp.GradScaler as in torch's examples; ``bad``: one rank's batch overflows in step 2."""
    model = world.wrap_model(mlp().float())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    optimizer = world.wrap(optimizer, model, grad_scaler=scaler)
    scales = []
    for step in range(5):
        for index, (x, y) in enumerate(world.batches(accumulate, seed=10 * step)):
            x, y = x.float(), y.float()
            if bad and step == 2 and world.size - 1 in world.ranks:
                x[-1] = torch.inf
            with contextlib.nullcontext() if index == accumulate - 1 else optimizer.no_sync():
                scaler.scale(mse_loss(model(x), y) / accumulate).backward()
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return model, scales


@loop(tolerance=1e-5, engines=("mpi", "horovod"), compressors=RESIDUALS_IN_TRUE_UNITS)
def grad_scaler(world: Any) -> Any:
    return scaled(world)


@loop(tolerance=1e-5, compressors=RESIDUALS_IN_TRUE_UNITS)
def grad_scaler_clipped(world: Any) -> Any:
    return scaled(world, unscale=True)


@loop(tolerance=1e-5, compressors=RESIDUALS_IN_TRUE_UNITS)
def grad_scaler_fused(world: Any) -> Any:
    """A fused optimizer unscales in its own kernel."""
    return scaled(world, fused=True)


@loop(tolerance=1e-5, compressors=RESIDUALS_IN_TRUE_UNITS)
def grad_scaler_accumulating(world: Any) -> Any:
    return scaled(world, unscale=True, accumulate=2)


@loop(tolerance=1e-5, compressors=RESIDUALS_IN_TRUE_UNITS)
def grad_scaler_overflow(world: Any) -> Any:
    """An inf on one rank: all skip the step and lower the scale by the same factor."""
    return scaled(world, unscale=True, bad=True)


def autocast(world: Any, dtype: torch.dtype) -> Any:
    model = world.wrap_model(mlp().float())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for x, y in world.batches():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            out = model(x.float())
        mse_loss(out.float(), y.float()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model


@loop(tolerance=2e-2)
def autocast_bfloat16(world: Any) -> Any:
    return autocast(world, torch.bfloat16)


@loop(tolerance=5e-3)
def autocast_float16(world: Any) -> Any:
    return autocast(world, torch.float16)


@loop(tolerance=2e-2)
def autocast_around_everything(world: Any) -> Any:
    """backward and step inside autocast, as some scripts have it."""
    model = world.wrap_model(mlp().float())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for x, y in world.batches():
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.zero_grad()
            mse_loss(model(x.float()).float(), y.float()).backward()
            optimizer.step()
    return model


@loop(tolerance=3e-2)
def bfloat16_parameters(world: Any) -> Any:
    model = world.wrap_model(mlp().bfloat16())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.05), model)
    for x, y in world.batches(3):
        optimizer.zero_grad()
        mse_loss(model(x.bfloat16()), y.bfloat16()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model


@loop(tolerance=3e-2, without_ddp="the layers are called one by one")
def mixed_dtypes(world: Any) -> Any:
    """Layers in float32, float64 and bfloat16."""
    model = make(lambda: nn.ModuleList(nn.Linear(8, size) for size in (8, 8, 4)))
    first, second, third = model[0].float(), model[1].bfloat16(), model[2].double()
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.05), model)
    for x, y in world.batches(3):
        optimizer.zero_grad()
        hidden = torch.tanh(first(x.float()))
        mse_loss(third(torch.tanh(second(hidden.bfloat16())).double()), y).backward()
        optimizer.step()
    return model


def bad_sample(world: Any, *, corrupt: bool) -> Any:
    """BatchNorm, and in step 3 an inf on the last rank: the step is skipped, and leaves no trace in the statistics."""
    model = make(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)))
    wrapped = world.wrap_model(model)
    optimizer = world.wrap(torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9), wrapped)
    for step in range(6):
        if step == 3 and not corrupt:
            continue
        optimizer.zero_grad()
        for rank in world.shares(model):
            x, y = world.sample(step, rank, rows=6)
            if step == 3 and rank == world.size - 1:
                x[2, 3] = torch.inf
            (mse_loss(wrapped(x), y) / len(world.ranks)).backward()
        optimizer.step()
    optimizer.synchronize_buffers()
    return model, model[1].running_mean, model[1].running_var


@loop()
def batch_norm(world: Any) -> Any:
    return bad_sample(world, corrupt=False)


@loop(
    reference=lambda world: bad_sample(world, corrupt=False),
    without_ddp="it knows no skipped step",
    engines=("mpi", "horovod"),
)
def batch_norm_with_a_bad_sample(world: Any) -> Any:
    return bad_sample(world, corrupt=True)


def skipping(world: Any, *, corrupt: bool) -> Any:
    """A NaN on one rank, with an adaptive optimizer and momentum: its state does not move either."""
    model = mlp()
    optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    for step in range(6):
        if step == 3 and not corrupt:
            continue
        optimizer.zero_grad()
        for rank in world.ranks:
            x, y = world.sample(step, rank)
            if step == 3 and rank == 1:
                y[0, 0] = torch.nan
            (mse_loss(model(x), y) / len(world.ranks)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model


@loop(reference=lambda world: skipping(world, corrupt=False), without_ddp="it knows no skipped step")
def clipped_step_with_a_nan(world: Any) -> Any:
    return skipping(world, corrupt=True)
