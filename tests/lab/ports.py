"""Ports for servers of the labs."""

from __future__ import annotations

import contextlib
import os
import socket


def free_ports(count: int, address: str = "") -> int:
    """The first of ``count`` consecutive free ports, all below the range that outgoing connections take theirs from."""
    # Where to begin differs by process, so that labs started at the same time do not meet.
    begin = os.getpid() % 1000
    for attempt in range(1000):
        first = 17000 + (begin + attempt) % 1000 * 10
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.create_server((address, port)))
            return first
    raise RuntimeError(f"no {count} free ports between 17000 and 27000")
