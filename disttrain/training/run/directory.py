"""Where a run writes: ``<output>/<name>`` is always the newest run of that name, older ones are kept beside it."""

from __future__ import annotations

import fcntl
import logging
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from disttrain.errors import UserError
from disttrain.training.checkpoints import folder as checkpoint_folder
from disttrain.training.config import Config
from disttrain.training.run import launches as elastic

logger = logging.getLogger(__name__)


@dataclass
class RunDirectory:
    """The directory, the checkpoint to go on from, and the lock that keeps other runs out until this one ends.

    ``run`` is the run's identity, which it keeps while it is resumed in this directory. ``attempt`` is another one each
    time; the lock's file holds it.
    """

    path: Path
    resumed: checkpoint_folder.Found | None
    run: str
    attempt: str
    lock: IO[str]


def open_run(config: Config, launches: list[str]) -> RunDirectory:
    """Make the run's directory, or open the one that is resumed. To be called on rank 0 alone.

    An older run of this name is renamed to ``<name>.1``, ``.2``, ... unless it is resumed. If an older checkpoint than
    its newest is resumed, the newer ones are renamed, so that ``resume=auto`` cannot return to them. Workers that
    ``launches`` started again, after it began the run, go on with it whatever the config says.

    Raises:
        UserError: there is no such checkpoint, or a running process uses the directory.
    """
    path = config.directory
    is_restarted = elastic.began(path, launches)
    resumed = (checkpoint_folder.newest(path / "checkpoints") if is_restarted else None) or _resumed(config)
    is_own = resumed is not None and path.resolve() in resumed.path.resolve().parents
    if path.exists():
        _lock(path).close()
        if not (is_own or is_restarted):
            aside = _free(path)
            path.rename(aside)
            logger.info("the earlier run %s is now %s", path, aside)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(config.to_yaml())
    except OSError as error:
        raise UserError(
            f"the run's folder {str(path)!r} cannot be written: {error.strerror}; set output to a folder that can be"
        ) from error
    if is_own and resumed is not None:
        for newer in checkpoint_folder.later_than(resumed.path):
            newer.rename(_free(newer.with_name(f"{newer.name}.superseded")))
    elastic.claim(path, launches)
    lock, attempt = _lock(path), uuid.uuid4().hex
    checkpoint_folder.remove_partial(path / "checkpoints")
    lock.write(attempt)
    lock.flush()
    run = resumed.manifest.run if is_own and resumed is not None else uuid.uuid4().hex
    return RunDirectory(path, resumed, run, attempt, lock)


def check_shared(path: Path, attempt: str) -> None:
    """Raise UserError if the run's directory is not the one that rank 0 has opened."""
    lock = path / ".lock"
    if not lock.is_file() or lock.read_text() != attempt:
        raise UserError(
            f"{str(path.absolute())!r} is not rank 0's: set output to a folder that all hosts share, or save nothing: "
            "checkpoint.every_epochs=null"
        )


def _resumed(config: Config) -> checkpoint_folder.Found | None:
    if config.resume == "never":
        return None
    if config.resume != "auto":
        return checkpoint_folder.find(Path(config.resume))
    folder = config.directory / "checkpoints"
    found = checkpoint_folder.newest(folder)
    if found is None and (broken := checkpoint_folder.checkpoints_in(folder)):
        logger.warning("none of the %d checkpoints in %s is whole: the run begins anew", len(broken), folder)
    return found


def _free(path: Path) -> Path:
    """The first of ``path.1``, ``path.2``, ... that does not exist."""
    number = 1
    while (numbered := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return numbered


def _lock(path: Path) -> IO[str]:
    file = (path / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{str(path)!r} belongs to a run that is going on: choose another name with name=...") from None
    except OSError:
        pass  # a file system without locks
    return file
