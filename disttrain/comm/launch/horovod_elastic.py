"""Horovod elastic: a worker that has lost another one, or learns of new hosts, begins anew in the same process.

Horovod's driver keeps the surviving workers and expects them to ask for their new ranks. A process whose engine has
failed is best rebuilt from nothing, so it replaces itself by its own program (``exec``: the driver sees the same
process), and asks before it joins. What it goes on from is the run's newest checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import NoReturn

from disttrain.errors import INTERRUPTING_SIGNALS

_REJOINS = "DISTTRAIN_REJOINS"
_VARIABLES = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")


def can_restart_process(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a worker of Horovod elastic."""
    return environ.get("HOROVOD_ELASTIC") == "1"


def leave(code: int) -> NoReturn:
    """End at once with this code; under Horovod elastic, begin anew instead.

    No orderly exit: an engine's own would wait for ranks that are gone, or gone elsewhere.
    """
    if can_restart_process():
        restart_process()
    os._exit(code)


def restart_process() -> NoReturn:
    """Replace this process by the program that it runs."""
    if threading.current_thread() is threading.main_thread():
        for number in INTERRUPTING_SIGNALS:  # ignored ones would stay so
            signal.signal(number, signal.SIG_DFL)
    for name in os.listdir("/proc/self/fd"):  # the engine's connections among them
        with contextlib.suppress(OSError):
            if int(name) > 2:
                os.set_inheritable(int(name), False)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, _REJOINS: "1"})


def request_rank() -> None:
    """In a process that began anew: wait until the driver knows who is left, and take the rank that it gives.

    A worker that is given none, as its host has been taken away, ends.
    """
    if os.environ.pop(_REJOINS, None) is None:
        return
    from urllib.request import urlopen  # here: it takes a while, and most programs never come here

    address, port = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]
    place = f"{os.environ['HOROVOD_HOSTNAME']}:{os.environ['HOROVOD_LOCAL_RANK']}"
    timeout = float(os.environ.get("HOROVOD_ELASTIC_TIMEOUT", "600"))
    with urlopen(f"http://{address}:{port}/rank_and_size/{place}", timeout=timeout) as answer:
        values = answer.read().decode().split(",")
    if values[0] == "-1":
        sys.exit(0)
    os.environ.update({f"HOROVOD_{name}": value for name, value in zip(_VARIABLES, values, strict=True)})
