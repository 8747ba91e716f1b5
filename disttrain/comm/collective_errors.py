"""Report an error of one rank on all ranks. Otherwise the others would wait for it, and report only that it is gone."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from disttrain.comm import Communicator
from disttrain.errors import UserError


class CollectiveError(UserError):
    """A user's mistake that every rank raises, so it is enough if one of them prints it."""


@contextlib.contextmanager
def collective_errors(comm: Communicator) -> Iterator[None]:
    """Run a block that may fail on some ranks; if it fails on any, raise on all. The end of the block is a barrier.

    The block must not contain collectives, unless it raises either on all ranks or on none.

    Raises:
        CollectiveError: a rank raised UserError or OSError in the block. All ranks raise it with the same message: that
            of the lowest such rank.
    """
    message: str | None = None
    cause: Exception | None = None
    try:
        yield
    except UserError as error:
        message, cause = str(error), error
    except OSError as error:
        message, cause = f"{error.strerror or error}: {error.filename}" if error.filename else str(error), error
    reports = comm.all_gather_object(None if message is None else [socket.gethostname(), message])
    failed = [(rank, *report) for rank, report in enumerate(reports) if report is not None]
    if failed:
        rank, host, message = failed[0]
        where = "" if len(failed) == comm.world_size else f" (on rank {rank}, host {host})"
        raise CollectiveError(f"{message}{where}") from cause
