"""Elastic Horovod: a worker restarts in the same process when another worker is lost or the set of hosts changes.

Horovod's driver keeps the surviving workers, and expects them to ask for their new ranks. The state of a process whose
engine has failed cannot be trusted, so the worker replaces itself with a new run of its program. As this is done by
``exec``, the driver sees the same process. The new run asks the driver for its rank before it joins the others, and
resumes from the newest checkpoint.
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
    """Whether this is a worker of elastic Horovod."""
    return environ.get("HOROVOD_ELASTIC") == "1"


def leave(code: int) -> NoReturn:
    """Exit immediately with this code. Under elastic Horovod, restart the process instead.

    Skips the engine's orderly shutdown, which would wait for ranks that are gone.
    """
    if can_restart_process():
        restart_process()
    os._exit(code)


def restart_process() -> NoReturn:
    """Replace this process with a new run of its program."""
    if threading.current_thread() is threading.main_thread():
        for number in INTERRUPTING_SIGNALS:  # exec keeps ignored signals ignored
            signal.signal(number, signal.SIG_DFL)
    for name in os.listdir("/proc/self/fd"):  # includes the engine's connections
        with contextlib.suppress(OSError):
            if int(name) > 2:
                os.set_inheritable(int(name), False)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, _REJOINS: "1"})


def request_rank() -> None:
    """In a restarted process, ask Horovod's driver for the new rank, and wait until it knows which workers are left.

    Updates the variables ``HOROVOD_RANK`` and the like. Exits if the driver assigns no rank, as the host was removed.
    """
    if os.environ.pop(_REJOINS, None) is None:
        return
    from urllib.request import urlopen  # slow to import, and rarely needed

    address, port = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]
    slot = f"{os.environ['HOROVOD_HOSTNAME']}:{os.environ['HOROVOD_LOCAL_RANK']}"
    timeout = float(os.environ.get("HOROVOD_ELASTIC_TIMEOUT", "600"))
    with urlopen(f"http://{address}:{port}/rank_and_size/{slot}", timeout=timeout) as answer:
        values = answer.read().decode().split(",")
    if values[0] == "-1":
        sys.exit(0)
    os.environ.update({f"HOROVOD_{name}": value for name, value in zip(_VARIABLES, values, strict=True)})
