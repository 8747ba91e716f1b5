"""Loops in which parameters are unused: in some steps, or on some ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

from tests.scripts.nets import Branches, make, mlp
from tests.scripts.registry import loop


@loop(telescopes=True, engines=("mpi", "horovod"))
def experts(world: Any) -> Any:
    """A mixture of experts: tokens of a rank go to some of them, one is unused on all ranks in most steps."""
    names = ("first", "second", "third")
    model = world.wrap_model(make(lambda: Branches(names)), find_unused_parameters=True)
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for step in range(8):
        optimizer.zero_grad()
        for rank in world.ranks:
            x, y = world.sample(step, rank)
            expert = "third" if step == 5 else names[(step + rank) % 2]
            (mse_loss(model(x, expert), y) / len(world.ranks)).backward()
        optimizer.step()
    return model


@loop()
def resting_with_weight_decay(world: Any) -> Any:
    """What no rank uses has no gradient, so neither decay nor momentum moves it."""
    model = world.wrap_model(make(Branches), find_unused_parameters=True)
    optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1), model)
    for step, (x, y) in enumerate(world.batches(6)):
        optimizer.zero_grad()
        mse_loss(model(x, "left" if step % 2 else "right"), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model


@loop(telescopes=True)
def layer_drop(world: Any) -> Any:
    """Layers are left out at random, by each rank for itself."""
    model = world.wrap_model(make(Branches), find_unused_parameters=True)
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for step in range(6):
        optimizer.zero_grad()
        for rank in world.ranks:
            x, y = world.sample(step, rank)
            draws = torch.rand(2, generator=torch.Generator().manual_seed(10 * step + rank))
            kept = [name for name, draw in zip(("left", "right"), draws, strict=True) if draw > 0.4]
            (mse_loss(model(x, *kept), y) / len(world.ranks)).backward()
        optimizer.step()
    return model


@loop(without_ddp="it must be wrapped again when heads are frozen")
def tasks_in_turn(world: Any) -> Any:
    """Multi-task: heads whose requires_grad is toggled, an old habit."""
    model = make(lambda: nn.ModuleDict({"body": nn.Linear(8, 8), "a": nn.Linear(8, 4), "b": nn.Linear(8, 4)}))
    wrapped = {task: nn.Sequential(model["body"], nn.Tanh(), model[task]) for task in ("a", "b")}
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    for step, (x, y) in enumerate(world.batches(6)):
        task, other = ("a", "b") if step % 2 else ("b", "a")
        model[task].requires_grad_(True)
        model[other].requires_grad_(False)
        optimizer.zero_grad()
        mse_loss(wrapped[task](x), y).backward()
        optimizer.step()
    return model


@loop(telescopes=True)
def several_tasks_a_step(world: Any) -> Any:
    """Two tasks' losses, backward one after the other; on some ranks a task has no data."""
    model = world.wrap_model(make(Branches), find_unused_parameters=True)
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for step in range(5):
        optimizer.zero_grad()
        for task in ("left", "right"):
            for rank in world.ranks:
                x, y = world.sample(step, rank)
                use = [task] if (step + rank) % 3 else []
                (mse_loss(model(x, *use), y) / (2 * len(world.ranks))).backward()
        optimizer.step()
    return model


@loop()
def rank_without_a_batch(world: Any) -> Any:
    """A rank that has nothing in a step takes part with a loss of zero, as DDP scripts do it."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for step in range(4):
        optimizer.zero_grad()
        for rank in world.ranks:
            x, y = world.sample(step, rank)
            (0.0 * model(x).sum() if rank == 1 else mse_loss(model(x), y)).div(len(world.ranks)).backward()
        optimizer.step()
    return model


@loop(telescopes=True, engines=("mpi",))
def never_used(world: Any) -> Any:
    """A parameter that nothing ever uses (a pooler, a second head)."""
    model = world.wrap_model(make(Branches), find_unused_parameters=True)
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(model(x, "left"), y).backward()
        optimizer.step()
    return model


@loop()
def frozen_base(world: Any) -> Any:
    """LoRA: the base is frozen, small factors beside it are trained."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(8, 8).requires_grad_(False)
            self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.up(self.down(x))

    model = world.wrap_model(make(lambda: nn.Sequential(LowRank(), nn.Tanh(), LowRank())))
    optimizer = world.wrap(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01), model)
    for x, y in world.batches(outputs=8):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    return model


@loop(without_ddp="it must be wrapped again when layers are unfrozen")
def unfrozen_layers(world: Any) -> Any:
    """Frozen first; unfrozen by requires_grad_ between steps, the last layers first."""
    model = mlp()
    for layer in (model[0], model[2]):
        layer.requires_grad_(False)
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    for step, (x, y) in enumerate(world.batches(6)):
        if step == 2:
            model[2].requires_grad_(True)
        if step == 4:
            model[0].requires_grad_(True)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    return model


@loop(without_ddp="it must be wrapped again when layers are added")
def added_layers(world: Any) -> Any:
    """A head is added to the model in mid-run, with a group of its own."""
    model = nn.ModuleDict({"body": mlp()})
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    for step, (x, y) in enumerate(world.batches(6)):
        if step == 3:
            model["head"] = mlp(features=4, seed=5)
            optimizer.add_param_group({"params": model["head"].parameters(), "lr": 0.05})
        optimizer.zero_grad()
        out = model["body"](x)
        mse_loss(model["head"](out) if "head" in model else out, y).backward()
        optimizer.step()
    return model


@loop(without_ddp="it must be wrapped again when layers are frozen")
def frozen_in_mid_run(world: Any) -> Any:
    """Early layers freeze one after another (FreezeOut)."""
    model = mlp()
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01), model)
    for step, (x, y) in enumerate(world.batches(6)):
        if step == 3:
            model[0].requires_grad_(False)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    return model
