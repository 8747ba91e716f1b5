"""The command line. Commands import torch only when they need it, so that ``--help`` is quick."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from disttrain.errors import (
    INTERRUPTED_EXIT_CODE,
    PEER_LOST_EXIT_CODE,
    UNHEALTHY_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    PeerLostError,
    UnhealthyError,
    UserError,
)

if TYPE_CHECKING:
    from rich.console import Console

    from disttrain.training.config import Config

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Train a model with many workers.")
_ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file, such as configs/digits.yaml")]
_Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as optimizer.lr=0.1 compressor.name=topk")
]
_Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]


@app.command()
def train(config: _ConfigPath, overrides: _Overrides = None, debug: _Debug = False) -> None:
    """Train as CONFIG says, with all workers that the launcher has started."""
    from rich.console import Console

    console = Console()
    _train(_load(config, overrides, console), console)


@app.command()
def config(
    config: _ConfigPath,
    overrides: _Overrides = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="check that N workers can train it")] = None,
    debug: _Debug = False,
) -> None:
    """Check CONFIG, and print it with all values."""
    loaded = _load(config, overrides)
    if workers is not None:
        loaded.check_world_size(workers)
    print(loaded.to_yaml(), end="")


@app.command()
def schedule(
    config: _ConfigPath,
    overrides: _Overrides = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="number of workers")] = 1,
    output: Annotated[str | None, typer.Option("--output", help="write all steps' rates to this .tsv file")] = None,
    debug: _Debug = False,
) -> None:
    """Preview the learning rate of a run: a table of notable steps, and a plot."""
    from disttrain.cli.schedule_preview import show

    show(_load(config, overrides), workers, output, _wide_console())


@app.command()
def layers(config: _ConfigPath, overrides: _Overrides = None, debug: _Debug = False) -> None:
    """Show the group, learning rate, weight decay and compressor of each parameter, or that it is frozen."""
    from disttrain.cli.layer_table import show

    show(_load(config, overrides), _wide_console())


@app.command()
def checkpoints(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the folder of a run (runs/digits) or of a checkpoint")],
    verify: Annotated[bool, typer.Option("--verify", help="compare every byte, not only sizes")] = False,
    prune: Annotated[
        int | None, typer.Option("--prune", min=1, help="delete all but the newest N complete ones, and the best")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    debug: _Debug = False,
) -> None:
    """Show the checkpoints of a run, and whether they are complete."""
    from pathlib import Path

    from disttrain.cli.checkpoint_table import show
    from disttrain.tasks.paths import expand_home

    show(Path(expand_home(run)), _wide_console(), verify=verify, keep=prune, as_json=as_json)


@app.command()
def doctor(
    probe: Annotated[
        bool, typer.Option("--probe", help="under a launcher: measure the engine's latency and bandwidth")
    ] = False,
    debug: _Debug = False,
) -> None:
    """Show which engines, devices and launchers are available, and how to install those that are missing."""
    from disttrain.cli.doctor import run

    raise typer.Exit(run(probe))


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="show the version")] = False
) -> None:
    if context.invoked_subcommand is None and not version:
        print(context.get_help())
    if version:
        from importlib.metadata import version as version_of

        print(f"disttrain {version_of('disttrain')}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the console script.

    Exit codes: 2 for a mistake of the user, 13 for a lost worker, 14 for an unhealthy run, 75 after a signal, and 1 for
    other errors.
    """
    debug = "--debug" in sys.argv
    try:
        _run_app()
    except UserError as error:
        if debug:
            traceback.print_exc()
        if _should_print(error):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        _exit_now(USER_ERROR_EXIT_CODE)
    except UnhealthyError as error:
        if _is_rank_zero():
            print(f"error: {error}", file=sys.stderr)
        _exit_now(UNHEALTHY_EXIT_CODE)
    except typer.Abort:  # Ctrl-C
        _exit_now(130)
    except PeerLostError:  # the guard has printed it already
        from disttrain.comm.launch import horovod_elastic

        if debug:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        horovod_elastic.leave(PEER_LOST_EXIT_CODE)
    except Exception:
        traceback.print_exc()
        _exit_now(1)
    sys.exit(0)


def _run_app() -> None:
    """Run the command. Turn typer's usage errors into UserErrors, which are printed in one line."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "disttrain"
        raise UserError(f"{error.format_message().rstrip('.')}; see {command} --help") from error
    if code:
        sys.exit(code)


def _load(path: str, overrides: list[str] | None, console: Console | None = None) -> Config:
    """Return the config. If it runs the code of a task, say so on the console first (stderr unless given)."""
    from rich.console import Console

    from disttrain.comm.launch.environment import detect
    from disttrain.training.config import load

    _set_up_logging(console or Console(stderr=True), detect().rank)
    return load(path, overrides or [])


def _train(config: Config, console: Console) -> None:
    from disttrain import comm
    from disttrain.comm.collective_errors import CollectiveError
    from disttrain.comm.launch import horovod_elastic
    from disttrain.training.trainer import Trainer

    collective_error: CollectiveError | UnhealthyError | None = None
    with comm.init(config.engine, config.device, config.timeout, watch=config.watch) as communicator:
        try:
            trainer = Trainer(config, communicator, console)
            try:
                summary = trainer.run()
            finally:
                trainer.close()
        except (CollectiveError, UnhealthyError) as error:  # raised on all ranks, so they can shut down in order
            collective_error = error
    if collective_error is not None:
        raise collective_error
    if trainer.interruption.restarts_process:
        horovod_elastic.restart_process()
    if summary["ended_by"] == "interrupted":
        raise typer.Exit(INTERRUPTED_EXIT_CODE)


def _wide_console() -> Console:
    """Return a console for the terminal, or one that is wide enough for any table."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=200)


def _set_up_logging(console: Console, rank: int) -> None:
    """Print disttrain's messages on the console, above the progress bar; on ranks other than 0, only errors."""
    from rich.logging import RichHandler

    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("disttrain")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)


def _should_print(error: UserError) -> bool:
    """Whether this process prints the error: one process per launch if all ranks raise it, otherwise one per host."""
    from disttrain.comm.collective_errors import CollectiveError
    from disttrain.comm.launch.environment import detect

    try:
        environment = detect()
    except UserError:
        return True
    return environment.rank == 0 or (environment.local_rank == 0 and not isinstance(error, CollectiveError))


def _is_rank_zero() -> bool:
    from disttrain.comm.launch.environment import detect

    return detect().rank == 0


def _exit_now(code: int) -> NoReturn:
    """Exit without the engine's shutdown, which would wait for ranks that have exited or are doing something else."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
