"""The command line of the benchmarks: ``python -m benchmarks``."""

from __future__ import annotations

from collections.abc import Callable

import typer

from benchmarks import index
from benchmarks.accuracy import convergence, finetune, mean_bits, recipe
from benchmarks.speed import checkpointing, encoders, plots, step_time
from benchmarks.time_to_loss import command as time_to_loss
from benchmarks.time_to_loss import plot as time_to_loss_plot

COMMANDS: dict[str, Callable[..., None]] = {
    "step-time": step_time.main,
    "time-to-loss": time_to_loss.main,
    "encoders": encoders.main,
    "checkpointing": checkpointing.main,
    "convergence": convergence.main,
    "recipe": recipe.main,
    "finetune": finetune.main,
    "mean-bits": mean_bits.main,
    "plot": plots.main,
    "plot-time-to-loss": time_to_loss_plot.main,
    "index": index.main,
}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for name, command in COMMANDS.items():
    app.command(name)(command)

if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
