"""What one rank finds wrong, all ranks report: otherwise the others would wait for it, and report only its absence."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from disttrain.comm import Communicator
from disttrain.errors import UserError


class CollectiveError(UserError):
    """A user's mistake that every rank knows of, so one of them is enough to report it."""


@contextlib.contextmanager
def collective_errors(comm: Communicator) -> Iterator[None]:
    """Run a block that may fail on some ranks, then make all ranks fail if any did. A barrier.

    The block must hold no collective, unless it raises on all ranks or on none.

    Raises:
        AgreedError: some rank raised UserError or OSError in the block; on every rank, with the first such message.
    """
    mistake: str | None = None
    cause: Exception | None = None
    try:
        yield
    except UserError as error:
        mistake, cause = str(error), error
    except OSError as error:
        mistake, cause = f"{error.strerror or error}: {error.filename}" if error.filename else str(error), error
    reports = comm.all_gather_object(None if mistake is None else [socket.gethostname(), mistake])
    failed = [(rank, *report) for rank, report in enumerate(reports) if report is not None]
    if failed:
        rank, host, message = failed[0]
        where = "" if len(failed) == comm.world_size else f" (on rank {rank}, host {host})"
        raise CollectiveError(f"{message}{where}") from cause
