"""Learning rates, groups edited in mid-run, averages of the weights, saving and loading."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch.nn.functional import mse_loss
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import disttrain
from tests.scripts.nets import mlp
from tests.scripts.registry import loop
from tests.scripts.world import Disttrain


def one_step(model: torch.nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


@loop(engines=("mpi", "horovod"))
def schedule_by_step(world: Any) -> Any:
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=6)
    rates = []
    for x, y in world.batches(6):
        one_step(model, optimizer, x, y)
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return model, rates


@loop()
def schedule_by_epoch(world: Any) -> Any:
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.02), model)
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, 3)
    scheduler = lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[2])
    for epoch in range(4):
        for x, y in world.batches(2, seed=10 * epoch):
            one_step(model, optimizer, x, y)
        scheduler.step()
    return model


@loop()
def schedule_on_the_inner_optimizer(world: Any) -> Any:
    """The scheduler was made before wrapping."""
    model = world.wrap_model(mlp())
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.ExponentialLR(inner, 0.7)
    optimizer = world.wrap(inner, model)
    for x, y in world.batches():
        one_step(model, optimizer, x, y)
        scheduler.step()
    return model


@loop()
def plateau(world: Any) -> Any:
    """ReduceLROnPlateau on a validation loss that all ranks compute on the same data."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.3), model)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    held_out = world.sample(99, 0)
    for x, y in world.batches(8):
        one_step(model, optimizer, x, y)
        with torch.no_grad():
            scheduler.step(mse_loss(model(held_out[0]), held_out[1]))
    return model, optimizer.param_groups[0]["lr"]


@loop()
def edited_groups(world: Any) -> Any:
    """Rates and momenta are set by hand, and the list of groups assigned."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    for step, (x, y) in enumerate(world.batches(6)):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        if step == 3:
            optimizer.param_groups[0]["momentum"] = 0.5
        if step == 4:
            optimizer.param_groups = [{**group, "weight_decay": 0.1} for group in optimizer.param_groups]
        one_step(model, optimizer, x, y)
    return model


@loop()
def layer_wise_rates(world: Any) -> Any:
    model = mlp()
    wrapped = world.wrap_model(model)
    groups = [{"params": layer.parameters(), "lr": 0.1 / (index + 1)} for index, layer in enumerate(model[::2])]
    optimizer = world.wrap(torch.optim.SGD(groups, lr=0.1), wrapped)
    for x, y in world.batches():
        one_step(wrapped, optimizer, x, y)
    return wrapped


@loop()
def ema(world: Any) -> Any:
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    average = AveragedModel(getattr(model, "module", model), multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for x, y in world.batches(6):
        one_step(model, optimizer, x, y)
        average.update_parameters(getattr(model, "module", model))
    return model, average


@loop(engines=("mpi", "horovod"))
def swa(world: Any) -> Any:
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    average, scheduler = AveragedModel(getattr(model, "module", model)), SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
    for step, (x, y) in enumerate(world.batches(6)):
        one_step(model, optimizer, x, y)
        if step > 2:
            average.update_parameters(getattr(model, "module", model))
            scheduler.step()
    return model, average


def averaged_by_hand(world: Any) -> Any:
    model = mlp()
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    average: dict[str, torch.Tensor] = {}
    for x, y in world.batches(6):
        one_step(model, optimizer, x, y)
        for name, parameter in model.named_parameters():
            average[name] = (
                average[name].lerp(parameter.detach(), 0.2) if name in average else parameter.detach().clone()
            )
    return model, average


@loop(reference=averaged_by_hand, without_ddp="it is disttrain's own")
def weight_average(world: Any) -> Any:
    model = mlp()
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    average = disttrain.WeightAverage(optimizer, decay=0.8, warmup=False)
    for x, y in world.batches(6):
        one_step(model, optimizer, x, y)
        average.update()
    return model, average.state_dict()


@loop()
def loaded_after_wrapping(world: Any) -> Any:
    """Weights are loaded into the wrapped model, the usual way."""
    model = world.wrap_model(mlp(seed=3))
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for index, (x, y) in enumerate(world.batches()):
        if index == 1:
            getattr(model, "module", model).load_state_dict(mlp(seed=0).state_dict())
        one_step(model, optimizer, x, y)
    return model


@loop(without_ddp="nothing is said there, and the new parameters are never exchanged")
def loaded_by_assignment(world: Any) -> Any:
    """load_state_dict(assign=True) makes new parameters, which the optimizer does not have: an error must say so."""
    model = mlp(seed=3)
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model.load_state_dict(mlp(seed=0).state_dict(), assign=True)
    x, y = next(iter(world.batches(1)))
    if isinstance(world, Disttrain):
        said = ""
        try:
            one_step(model, optimizer, x, y)
        except disttrain.UserError as error:
            said = str(error)
        assert "assign" in said, f"what is said about assign=True: {said!r}"
    return True


def resumed(world: Any, *, stop: bool) -> Any:
    """Saved in the middle and loaded into new objects, or not."""
    model = mlp()
    optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    for step, (x, y) in enumerate(world.batches(6)):
        if stop and step == 3:
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            model = mlp(seed=9)
            optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), model)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        one_step(model, optimizer, x, y)
    return model


@loop(reference=lambda world: resumed(world, stop=False), without_ddp="it has no state", engines=("mpi", "horovod"))
def saved_and_loaded(world: Any) -> Any:
    return resumed(world, stop=True)


@loop(without_ddp="a copy of its model has its hooks too")
def copied_model(world: Any) -> Any:
    """A copy of a model in training, as for evaluation or a lookahead, is a model of its own."""
    model = mlp()
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        twin = copy.deepcopy(model)
        twin.zero_grad()
        mse_loss(twin(x), y + 1).backward()
        optimizer.step()
    return model


@loop()
def lookahead(world: Any) -> Any:
    """Slow weights that follow the fast ones, and are copied back to them."""
    model = world.wrap_model(mlp())
    optimizer = world.wrap(torch.optim.Adam(model.parameters(), lr=0.02), model)
    slow = [parameter.detach().clone() for parameter in model.parameters()]
    for step, (x, y) in enumerate(world.batches(6)):
        one_step(model, optimizer, x, y)
        if step % 2:
            with torch.no_grad():
                for kept, parameter in zip(slow, model.parameters(), strict=True):
                    parameter.copy_(kept.lerp_(parameter, 0.5))
    return model
