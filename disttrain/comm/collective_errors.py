"""Raising an error of one rank on all ranks, which would otherwise wait for that rank."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from disttrain.comm import Communicator
from disttrain.errors import UserError


class CollectiveError(UserError):
    """A UserError that is raised on all ranks, so that only one of them needs to report it."""


@contextlib.contextmanager
def collective_errors(comm: Communicator) -> Iterator[None]:
    """Make all ranks fail if the block raises UserError or OSError on any rank. A barrier.

    The block must not contain collectives, unless whatever it raises before them is raised on all ranks.

    Raises:
        CollectiveError: the block raised on some rank; on all ranks, with the message of the lowest one.
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
