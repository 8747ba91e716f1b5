"""``disttrain schedule``: previewing the learning rate of a run as a table, a text plot and a file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from disttrain.errors import UserError
from disttrain.optim.schedules.learning_rate import LearningRate
from disttrain.tasks.paths import expand_home
from disttrain.training.config import Config
from disttrain.training.data.loading import num_samples_of
from disttrain.training.run.length import RunLength

_WIDTH, _HEIGHT = 64, 13
_EVENLY, _MOST_ROWS = 6, 24


@dataclass(frozen=True)
class Preview:
    """The learning rate of every step, of parameters that have no factor of their own.

    Attributes:
        rates: by step, from 0.
        steps_per_epoch: steps in an epoch.
        notable: steps to show in the table.
        remarks: lines to print above it.
    """

    rates: list[float]
    steps_per_epoch: int
    notable: list[int]
    remarks: list[str]

    def table(self) -> Table:
        """Return a table of the notable steps."""
        table = Table("step", "epoch", "learning rate", "")
        highest, lowest = max(self.rates), min(self.rates)
        for step in self.notable:
            rate = self.rates[step]
            words = [word for word, limit in (("highest", highest), ("lowest", lowest)) if rate == limit]
            remark = words[0] if words and highest > lowest else ""
            table.add_row(str(step), f"{step / self.steps_per_epoch:.2f}", f"{rate:.6g}", remark)
        return table

    def plot(self) -> str:
        """Return a plot of the rate in plain characters."""
        count, top = len(self.rates), max(self.rates)
        width = min(_WIDTH, count)
        rows = [[" "] * width for _ in range(_HEIGHT)]
        before: int | None = None
        for column in range(width):
            part = self.rates[column * count // width : (column + 1) * count // width]
            levels = [round((_HEIGHT - 1) * rate / top) for rate in part]
            low, high = min(levels), max(levels)
            if before is not None:  # leave no gaps in the line
                low, high = min(low, before + 1) if low > before else low, max(high, before - 1)
            for level in range(low, high + 1):
                rows[_HEIGHT - 1 - level][column] = "*"
            before = levels[-1]
        labels = {0: f"{top:.3g}", _HEIGHT // 2: f"{top * (_HEIGHT - 1 - _HEIGHT // 2) / (_HEIGHT - 1):.3g}"}
        labels[_HEIGHT - 1] = "0"
        lines = [f"{labels.get(index, ''):>10} |{''.join(row).rstrip()}" for index, row in enumerate(rows)]
        lines.append(f"{'':>10} +{'-' * width}")
        lines.append(f"{'':>11} 0{f'{count} steps':>{max(0, width - 1)}}")
        return "\n".join(lines)

    def write(self, path: str) -> None:
        """Write a line for every step, tab-separated: step, epoch, lr.

        Raises:
            UserError: the file cannot be written.
        """
        lines = [f"{step}\t{step / self.steps_per_epoch:.6g}\t{rate!r}\n" for step, rate in enumerate(self.rates)]
        try:
            with open(path, "w") as file:
                file.writelines(["step\tepoch\tlr\n", *lines])
        except OSError as error:
            raise UserError(f"--output {path!r} cannot be written: {error.strerror}") from error


def preview(config: Config, num_workers: int) -> Preview:
    """Return the learning rate that the config sets with ``num_workers`` workers.

    Raises:
        UserError: the config does not fit the workers or the data.
    """
    config.check_world_size(num_workers)
    run_length = RunLength.from_config(config, num_samples_of(config.task.train_data()))
    num_steps, steps_per_epoch = run_length.num_steps, run_length.steps_per_epoch
    scale = config.optimizer.scale(config.batch_size)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.optimizer.lr)
    rate = LearningRate(optimizer, config.schedule, num_steps, steps_per_epoch=steps_per_epoch, scale=scale)
    rates = []
    for step in range(num_steps):
        rate.set(step)
        rates.append(rate.lr)
    remarks = [
        f"{num_steps} steps, {num_steps / steps_per_epoch:g} epochs of {steps_per_epoch}; batch of {config.batch_size} "
        f"= workers {num_workers} x accumulation {config.accumulation} x "
        f"{config.batch_size // num_workers // config.accumulation}"
    ]
    if scale != 1:
        optimizer_section = config.optimizer
        remarks.append(
            f"all rates are multiplied by {scale:g}: {optimizer_section.lr_scaling} scaling with batch size "
            f"{config.batch_size} / {optimizer_section.base_batch_size}"
        )
    if run_length.may_take_fewer_steps:
        remarks.append("steps are of the initial batch; the batch policy's own steps and gain are not shown")
    if rate.tracker is not None:
        remarks.append(f"as long as {rate.tracker.metric} keeps improving; the rate falls when it does not")
    return Preview(rates, steps_per_epoch, _notable(config, num_steps, steps_per_epoch), remarks)


def _notable(config: Config, num_steps: int, steps_per_epoch: int) -> list[int]:
    of_schedule = sorted(step for step in config.schedule.notable_steps(num_steps, steps_per_epoch) if step < num_steps)
    if len(of_schedule) > _MOST_ROWS:  # the first, the last, and some in between
        last = len(of_schedule) - 1
        of_schedule = [of_schedule[index * last // (_MOST_ROWS - 1)] for index in range(_MOST_ROWS)]
    evenly = {(num_steps - 1) * index // _EVENLY for index in range(_EVENLY + 1)}
    return sorted({*of_schedule, *evenly})


def show(config: Config, num_workers: int, output: str | None, console: Console) -> None:
    """Print the preview, and write it to ``output`` if given."""
    found = preview(config, num_workers)
    if output is not None:
        found.write(expand_home(output))
    for remark in found.remarks:
        console.print(remark, highlight=False, soft_wrap=True)
    console.print(found.table())
    console.print(found.plot(), highlight=False, markup=False, soft_wrap=True)
