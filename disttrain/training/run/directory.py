"""The directory of a run: ``<output>/<name>`` is the newest run of that name; earlier ones are kept beside it."""

from __future__ import annotations

import fcntl
import logging
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from disttrain.comm import Communicator
from disttrain.comm.collective_errors import collective_errors
from disttrain.errors import UserError
from disttrain.training.checkpoints import folder as checkpoint_folder
from disttrain.training.checkpoints.folder import StoredCheckpoint
from disttrain.training.checkpoints.manifest import Manifest
from disttrain.training.config import Config
from disttrain.training.run.launches import gather_launch_ids, is_run_of, record_launches

logger = logging.getLogger(__name__)


@dataclass
class RunDirectory:
    """A run's directory, open for one attempt at the run.

    Attributes:
        path: the directory.
        checkpoint: the checkpoint to resume from, or None.
        run: identity of the run, which is kept when the run is resumed in this directory.
        attempt: identity of this attempt, new each time. The lock file holds it.
        lock: on rank 0, the open lock file, which keeps other runs out; None on the other ranks.
    """

    path: Path
    checkpoint: StoredCheckpoint | None
    run: str
    attempt: str
    lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.path / "checkpoints"

    def close(self) -> None:
        """Release the lock."""
        if self.lock is not None:
            self.lock.close()


def open_run_directory(config: Config, comm: Communicator) -> RunDirectory:
    """Create the run's directory, or open the one to resume. A collective.

    An earlier run of this name is renamed to ``<name>.1``, ``.2``, ... unless it is resumed. When a checkpoint other
    than the newest is resumed, the newer ones are renamed, so that ``resume=auto`` cannot return to them. Workers that
    a launcher has restarted continue the run of their launch, regardless of the config.

    Raises:
        UserError: there is no such checkpoint, a running process uses the directory, or ranks see different
            directories although checkpoints are to be saved; on all ranks.
    """
    launch_ids = gather_launch_ids(comm)
    directory: RunDirectory | None = None
    opened: list[Any] | None = None
    with collective_errors(comm):
        if comm.rank == 0:
            directory = _open(config, launch_ids)
            found = directory.checkpoint and [
                str(directory.checkpoint.path),
                directory.checkpoint.manifest.model_dump(),
            ]
            opened = [directory.run, directory.attempt, found]
    run, attempt, found = comm.broadcast_object(opened)
    if directory is None:
        checkpoint = found and StoredCheckpoint(Path(found[0]), Manifest.model_validate(found[1]))
        directory = RunDirectory(config.directory, checkpoint, run, attempt)
    if config.checkpoint.enabled:
        with collective_errors(comm):
            _check_is_shared(directory)
    return directory


def _open(config: Config, launch_ids: list[str]) -> RunDirectory:
    """Rank 0's part of ``open_run_directory``."""
    path = config.directory
    is_restarted = is_run_of(path, launch_ids)
    found = (checkpoint_folder.newest(path / "checkpoints") if is_restarted else None) or _checkpoint_to_resume(config)
    is_own = found is not None and path.resolve() in found.path.resolve().parents
    if path.exists():
        _lock(path).close()
        if not (is_own or is_restarted):
            aside = _first_free(path)
            path.rename(aside)
            logger.info("the earlier run %s is now %s", path, aside)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(config.to_yaml())
    except OSError as error:
        raise UserError(
            f"cannot write to the run's directory {str(path)!r}: {error.strerror}; set output to a writable folder"
        ) from error
    if is_own and found is not None:
        for newer in checkpoint_folder.later_than(found.path):
            newer.rename(_first_free(newer.with_name(f"{newer.name}.superseded")))
    record_launches(path, launch_ids)
    lock, attempt = _lock(path), uuid.uuid4().hex
    checkpoint_folder.remove_partial(path / "checkpoints")
    lock.write(attempt)
    lock.flush()
    run = found.manifest.run if is_own and found is not None else uuid.uuid4().hex
    return RunDirectory(path, found, run, attempt, lock)


def _check_is_shared(directory: RunDirectory) -> None:
    """Raise UserError if this rank sees another directory than the one that rank 0 has opened."""
    lock = directory.path / ".lock"
    if not lock.is_file() or lock.read_text() != directory.attempt:
        raise UserError(
            f"{str(directory.path.absolute())!r} is not the directory that rank 0 has opened: set output to a folder "
            "that all hosts share, or save no checkpoints: checkpoint.every_epochs=null"
        )


def _checkpoint_to_resume(config: Config) -> StoredCheckpoint | None:
    if config.resume == "never":
        return None
    if config.resume != "auto":
        return checkpoint_folder.find(Path(config.resume))
    folder = config.directory / "checkpoints"
    found = checkpoint_folder.newest(folder)
    if found is None and (broken := checkpoint_folder.checkpoints_in(folder)):
        logger.warning("none of the %d checkpoints in %s is complete: the run starts afresh", len(broken), folder)
    return found


def _first_free(path: Path) -> Path:
    """Return the first of ``path.1``, ``path.2``, ... that does not exist."""
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
        raise UserError(f"a running process uses {str(path)!r}: choose another name with name=...") from None
    except OSError:
        pass  # the file system has no locks
    return file
