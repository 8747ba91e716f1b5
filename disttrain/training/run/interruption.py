"""Signals that ask a run to end: all ranks then stop together, after the step that is under way."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from disttrain.errors import INTERRUPTING_SIGNALS
from disttrain.optim.distributed import DistributedOptimizer

if TYPE_CHECKING:
    from typing_extensions import Self

_END, _BEGIN_ANEW = 1, 2  # votes
# A terminal signals the launcher and its workers, and the launcher then signals the workers: one wish, two signals.
_ECHO_SECONDS = 1.0


class Interruption:
    """While entered, SIGTERM, SIGUSR1 or SIGINT to any rank makes all ranks stop after the same step.

    The wish travels with what every step of the optimizer agrees on anyway, so waiting for it costs nothing. A second
    signal, at least a second after the first, ends the process at once. ::

        with disttrain.Interruption(optimizer) as interruption:
            for x, y in loader:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
                if interruption.requested:         # alike on all ranks
                    save()
                    break

    A signal that is ignored when this is entered stays so (``nohup``). Python handles signals in the main thread alone;
    entered in another, this reacts to ``request`` only. Once the ranks have agreed to stop, the signals are ignored
    also after the block: the process is about to end, and launchers often signal what is ending once more.
    """

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self._optimizer = optimizer
        self._reason: str | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the ranks agreed, in the optimizer's last step, to stop: alike on all of them."""
        return self._optimizer.agreed_vote > 0

    @property
    def restarts_process(self) -> bool:
        """Whether they stop because hosts came or went (Horovod elastic), to begin anew with those that there are."""
        return self._optimizer.agreed_vote == _BEGIN_ANEW

    def request(self, reason: str, *, restart_process: bool = False) -> None:
        """Ask all ranks to stop after the present step, as a signal does; on one rank or on several."""
        self._reason = reason
        self._optimizer.vote = max(self._optimizer.vote, _BEGIN_ANEW if restart_process else _END)

    def asked_by(self) -> str:
        """Who asked first, by rank: ``SIGTERM on rank 1 (host node-b)``. A collective; to be called once requested."""
        asked = self._optimizer.comm.all_gather_object(self._reason and [self._reason, socket.gethostname()])
        rank, (reason, host) = next((rank, found) for rank, found in enumerate(asked) if found)
        return f"{reason} on rank {rank} (host {host})"

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in INTERRUPTING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._on_signal) for number in wanted}
        self._optimizer.comm.on_hosts_changed(lambda: self.request("new or lost hosts", restart_process=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stops = error is None and self.requested
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if stops else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._reason is None:
            self._since = time.monotonic()
            self.request(signal.Signals(number).name)
        elif time.monotonic() - self._since > _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def ignore_signals(worker: int) -> None:
    """To be a DataLoader's ``worker_init_fn``: who signals a process group means the rank, which needs its batches."""
    for number in INTERRUPTING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
