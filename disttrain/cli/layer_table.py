"""``disttrain layers``: the group, learning rate, weight decay and compressor of each parameter."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from disttrain.errors import UserError
from disttrain.training.config import Config
from disttrain.training.setup import build_model


def layer_table(config: Config) -> Table:
    """Return a table with a row for each parameter of the config's model, in the model's order.

    Raises:
        UserError: rules for layers or compressors do not fit the model.
    """
    model = build_model(config.task)
    config.layers.freeze(model)
    optimizer = config.optimizer.build(config.layers.groups(model, config.optimizer.lr))
    groups = {p: (index, group) for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    scale = config.optimizer.scale(config.batch_size)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p in groups}
    if not trained:
        raise UserError("the model has no parameter that requires a gradient: there is nothing to train")
    unfrozen_at = {p: step for step, parameters in config.layers.unfreezing(model).items() for p in parameters}
    compressors = dict(zip(trained, config.compressor.assign(trained), strict=True))
    columns = ["parameter", "shape", "group", "learning rate", "weight decay", "compressor"]
    table = Table(*columns, *(["trust ratio"] if config.optimizer.layerwise else []))
    for name, parameter in model.named_parameters():
        shape = "x".join(map(str, parameter.shape)) or "scalar"
        if name not in trained:
            table.add_row(name, shape, "frozen")
            continue
        index, group = groups[parameter]
        decay = group["weight_decay"] or group["decoupled_decay"]
        number = f"{index}, from step {unfrozen_at[parameter]} on" if parameter in unfrozen_at else str(index)
        row = [name, shape, number, f"{group['lr'] * scale:.6g}", f"{decay:g}", compressors[name].name]
        if config.optimizer.layerwise:
            adapt = group["adapt"]
            row.append("yes" if (parameter.dim() > 1 if adapt is None else adapt) else "no")
        table.add_row(*row)
    numbers = [parameter.numel() for parameter in groups]
    table.caption = (
        f"{sum(numbers):,} of {sum(p.numel() for p in model.parameters()):,} elements are trained, in "
        f"{len(optimizer.param_groups)} groups; learning rates are without the schedule's factor"
    )
    return table


def show(config: Config, console: Console) -> None:
    """Print the table."""
    console.print(layer_table(config))
