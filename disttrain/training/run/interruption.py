"""Signals that end a run: all ranks stop together, after the current step."""

from __future__ import annotations

import multiprocessing
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

_STOP, _RESTART = 1, 2  # votes
# A terminal signals the launcher and its workers, and the launcher signals the workers again: one Ctrl-C, two signals.
_ECHO_SECONDS = 1.0


class Interruption:
    """While entered, SIGTERM, SIGUSR1 or SIGINT to any rank makes all ranks stop after the same step.

    The request is part of the message that ranks exchange in every optimizer step anyway, so it costs nothing. A second
    signal, at least a second after the first, ends the process immediately. ::

        with disttrain.Interruption(optimizer) as interruption:
            for x, y in loader:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
                if interruption.requested:         # the same on all ranks
                    save()
                    break

    Signals that are ignored when the block is entered stay ignored (``nohup``). Python handles signals only in the main
    thread; in other threads, only ``request`` works. Once the ranks have agreed to stop, the signals stay ignored after
    the block: the process is about to end, and launchers often signal it again.
    """

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self._optimizer = optimizer
        self._reason: str | None = None
        self._requested_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the ranks have agreed, in the optimizer's last step, to stop; the same on all ranks."""
        return self._optimizer.agreed_vote > 0

    @property
    def restarts_process(self) -> bool:
        """Whether they stop because hosts were added or lost (Horovod elastic), to restart on the current ones."""
        return self._optimizer.agreed_vote == _RESTART

    def request(self, reason: str, *, restart_process: bool = False) -> None:
        """Make all ranks stop after the current step, as a signal does. One or more ranks may call this."""
        self._reason = reason
        self._optimizer.vote = max(self._optimizer.vote, _RESTART if restart_process else _STOP)

    def requested_by(self) -> str:
        """Return the lowest rank's request: ``SIGTERM on rank 1 (host node-b)``. A collective, after ``requested``."""
        requests = self._optimizer.comm.all_gather_object(self._reason and [self._reason, socket.gethostname()])
        rank, (reason, host) = next((rank, found) for rank, found in enumerate(requests) if found)
        return f"{reason} on rank {rank} (host {host})"

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in INTERRUPTING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._on_signal) for number in handled}
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
            self._requested_at = time.monotonic()
            self.request(signal.Signals(number).name)
        elif time.monotonic() - self._requested_at > _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def ignore_signals(worker: int) -> None:
    """Ignore the signals in a loader process, as a DataLoader's ``worker_init_fn``, unless the rank itself sends them.

    Launchers signal whole process groups, and the rank still needs its batches. When the rank exits, it ends its loader
    processes by SIGTERM, and waits for them.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        for number in INTERRUPTING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        return
    rank = multiprocessing.parent_process()
    assert rank is not None, "called in a loader process"
    signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTING_SIGNALS)
    threading.Thread(target=_exit_on_signal_from, args=(rank.pid,), daemon=True).start()


def _exit_on_signal_from(sender: int | None) -> None:
    while signal.sigwaitinfo(INTERRUPTING_SIGNALS).si_pid != sender:
        pass
    os._exit(0)
