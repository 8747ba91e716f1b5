"""The guard detects dead, stopped and unreachable ranks, independent of the engine.

Engines differ in what they do when a worker dies: gloo fails immediately, MPI and Horovod may block forever in C code.
Therefore every rank keeps a TCP connection to rank 0, watched by a thread. When a connection ends without a goodbye, or
a peer is silent for too long, rank 0 tells all other ranks which rank was lost. Each survivor prints a one-line error
immediately (launchers kill survivors soon after), and exits with code 13 if its main thread, which may be stuck in the
engine, does not react.

Heartbeats carry what the rank is doing (``comm.liveness.activity``). From them rank 0 also finds a rank that is alive
but holds up a collective that others wait in, and a rank that is slow (``comm.liveness.watchdog``).
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import selectors
import socket
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from disttrain.comm.launch.horovod_elastic import leave
from disttrain.comm.liveness.activity import Activity
from disttrain.comm.liveness.connections import (
    BrokenConnectionError,
    Connection,
    Message,
    ObjectCommunicator,
    connect_star,
)
from disttrain.comm.liveness.watchdog import Watchdog
from disttrain.errors import PEER_LOST_EXIT_CODE, PeerLostError, UserError

if TYPE_CHECKING:
    from typing_extensions import Self

_BEATS_PER_SILENCE = 6
_MAX_REASON = 500
# An engine often raises because a peer died. The guard's own message about the peer may take this long to arrive.
_LOSS_MESSAGE_SECONDS = 2.0
_FAREWELL_SECONDS = 1.0


class Guard:
    """Watches the other ranks. All ranks construct it together, right after the communicator.

    As a context manager it also tells the others why this rank leaves (an exception, ``sys.exit``). Without one,
    ``sys.excepthook`` reports an unhandled exception, and a normal end of the program says goodbye.

    Args:
        comm: the communicator.
        silence: seconds without a heartbeat after which a rank counts as lost. A rank sends about six in that time.
        grace: seconds that the main thread has, once a rank is lost, to call ``check`` or end. Then the process exits
            with code 13.
        activity: what this rank is doing; None to report nothing.
        stall: seconds that ranks may wait in a collective that another, live rank has not started; None for no limit.
        end_on_stall: whether a stall ends all ranks, as a loss does. If not, rank 0 prints a warning.
        straggler_factor: rank 0 warns of a rank whose steps take more than this many times the median of the other
            ranks; None for no warning.
        late: seconds of waiting after which rank 0 prints a warning; None for no warning.

    Attributes:
        lost: which rank was lost and how, or None.
        straggler: on rank 0, the slowest rank and the ratio of its step time to the median of the others; None if
            unknown.
        warning: why this guard cannot watch, or None. The same on all ranks; rank 0 prints it.
    """

    def __init__(
        self,
        comm: ObjectCommunicator,
        silence: float = 30.0,
        grace: float = 10.0,
        activity: Activity | None = None,
        stall: float | None = None,
        end_on_stall: bool = True,
        straggler_factor: float | None = None,
        late: float | None = None,
    ) -> None:
        self.rank = comm.rank
        self.lost: str | None = None
        self.warning: str | None = None
        self.straggler: tuple[int, float] | None = None
        self._silence, self._grace = silence, grace
        self._beat_interval = min(silence, stall or math.inf, late or math.inf) / _BEATS_PER_SILENCE
        self._activity, self._end_on_stall = activity or Activity(), end_on_stall
        self._loss_reported, self._loss_handled = threading.Event(), threading.Event()
        self._leave_deadline = math.inf
        self._has_raised = False
        self._peers: dict[int, Connection] = {}
        if comm.world_size == 1:
            return
        self._names = [
            f"rank {rank} (host {host}, pid {pid})"
            for rank, (host, pid) in enumerate(comm.all_gather_object([socket.gethostname(), os.getpid()]))
        ]
        self._watchdog = Watchdog(self._names, stall, straggler_factor, late)
        self._peers, self.warning = connect_star(comm)
        if self.warning is not None:
            if self.rank == 0:
                _print(
                    f"warning: dead ranks will not be detected: {self.warning}. On all hosts, set GLOO_SOCKET_IFNAME "
                    "to the network interface that connects them"
                )
            return
        self._wake_sender, self._wake_receiver = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="disttrain-guard", daemon=True)
        self._previous_hook, sys.excepthook = sys.excepthook, self._on_unhandled
        atexit.register(self.close)
        # A forked child (a DataLoader worker) would keep the connections open after its parent's death.
        os.register_at_fork(after_in_child=self._close_sockets)
        self._thread.start()

    @property
    def metrics(self) -> dict[str, float]:
        """``straggler/rank`` and ``straggler/ratio``; empty if unknown."""
        if self.straggler is None:
            return {}
        rank, ratio = self.straggler
        return {"straggler/rank": rank, "straggler/ratio": ratio}

    def check(self) -> None:
        """Raise ``PeerLostError`` if a rank was lost. Its message has been printed already."""
        if self.lost is not None:
            self._loss_handled.set()
            raise PeerLostError(self.lost)

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank leaves because of ``error``. ``sys.exit(0)`` says goodbye, as ``close`` does.

        Raises:
            PeerLostError: another rank was lost or has finished, which is the likely cause of ``error``.
        """
        if not self._peers:
            return
        if isinstance(error, SystemExit) and error.code in (None, 0):
            self.close()
            return
        if isinstance(error, Exception) and not isinstance(error, UserError | PeerLostError):
            self._has_raised = True
            self._wake_sender.send(b"x")
            self._loss_reported.wait(_LOSS_MESSAGE_SECONDS)
        if self.lost is not None and not isinstance(error, UserError):
            self._loss_handled.set()
            raise PeerLostError(self.lost) from error
        self._disconnect({"kind": "failed", "reason": _describe(error), "report": self._activity.report()})

    def close(self) -> None:
        """Say goodbye, so that the end of this rank does not count as a loss."""
        if self._peers:
            self._disconnect({"kind": "goodbye", "report": self._activity.report()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
        self.close()

    def _disconnect(self, message: Message) -> None:
        self._loss_handled.set()
        self._leave_deadline = time.monotonic() + _FAREWELL_SECONDS
        for peer in self._peers.values():
            peer.send(message)
            peer.finish_sending()
        self._wake_sender.send(b"x")
        # The thread reads until the others disconnect: closing a socket with unread data would reset the connection
        # and could discard our last message.
        self._thread.join(2 * _FAREWELL_SECONDS)
        self._close_sockets()
        atexit.unregister(self.close)
        if sys.excepthook == self._on_unhandled:
            sys.excepthook = self._previous_hook

    def _close_sockets(self) -> None:
        """Close all sockets without sending anything. Also called in a forked child."""
        for peer in self._peers.values():
            peer.close()
        self._wake_sender.close()
        self._wake_receiver.close()
        self._peers = {}

    def _on_unhandled(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            self.fail(error)
        except PeerLostError:
            # Already reported. Exit immediately: an orderly shutdown of the engine would wait for the lost rank.
            _exit()
        self._previous_hook(kind, error, trace)

    def _run(self) -> None:
        """Receive, send heartbeats and measure silence. Runs in the guard's thread."""
        # `watched` is a clock that stops while this process is stopped (a suspended job, a debugger), so that the time
        # does not count as silence of the others.
        watched, previous, next_beat = 0.0, time.monotonic(), 0.0
        last_heard = dict.fromkeys(self._peers, 0.0)
        peers = dict(self._peers)
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_receiver, selectors.EVENT_READ)
            for rank, peer in peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while self.lost is None and previous < self._leave_deadline:
                leaving = self._leave_deadline < math.inf
                if leaving and not last_heard:
                    break
                events = selector.select(_FAREWELL_SECONDS if leaving else self._beat_interval)
                now = time.monotonic()
                watched += min(now - previous, self._beat_interval)
                previous = now
                for rank in [key.data for key, _ in events]:
                    if rank is None:
                        self._wake_receiver.recv(1)
                        continue
                    last_heard[rank] = watched
                    if self._has_disconnected(rank, peers[rank]):
                        selector.unregister(peers[rank])
                        peers[rank].close()
                        del last_heard[rank]
                if self._has_raised and not leaving:
                    self._has_raised = False
                    report = self._activity.report()
                    self._watchdog.update(self.rank, report)
                    self._watchdog.mark_raised(self.rank)
                    for rank in last_heard:
                        peers[rank].send({"kind": "trouble", "report": report})
                    self._check_finished()
                if watched >= next_beat:
                    next_beat = watched + 0.9 * self._beat_interval
                    report = self._activity.report()
                    self._watchdog.update(self.rank, report)
                    for rank in last_heard:
                        peers[rank].send({"kind": "alive", "report": report})
                    silent = [rank for rank, heard in last_heard.items() if watched - heard > self._silence]
                    if silent:
                        self._report_lost_rank(silent[0], f"was lost: no heartbeat for {self._silence:g} s")
                    else:
                        self._check_finished()
                        if self.rank == 0 and self.lost is None:
                            self._check_progress()
        if self.lost is not None and not self._loss_handled.wait(self._grace):
            _exit()

    def _has_disconnected(self, rank: int, peer: Connection) -> bool:
        try:
            messages = peer.receive()
        except BrokenConnectionError:
            self._report_lost_rank(rank, "was lost: its process ended or its connection broke")
            return True
        for message in messages:
            self._watchdog.update(rank, message.get("report"))
            match message.get("kind"):
                case "goodbye":
                    self._watchdog.mark_finished(rank)
                    return True
                case "trouble":
                    self._watchdog.mark_raised(rank)
                    self._check_finished()
                case "failed":
                    self._report_lost_rank(rank, f"failed: {message.get('reason')}")
                    return True  # it prints its own error
                case "lost":
                    self._report_loss(str(message.get("message")))
        return False

    def _check_finished(self) -> None:
        """Report a rank that finished while others wait for it. Rank 0 checks all ranks, the others rank 0."""
        if (message := self._watchdog.check_finished()) is not None:
            self._report_loss(message)

    def _check_progress(self) -> None:
        """Report late, stalled and slow ranks. Called on rank 0 with every beat."""
        self.straggler = self._watchdog.slowest()
        if (message := self._watchdog.check_slow()) is not None:
            _print(f"warning: {message}")
        if (message := self._watchdog.check_late()) is not None:
            _print(f"warning: {message}")
        if (message := self._watchdog.check_stalled()) is not None:
            if self._end_on_stall:
                self._report_loss(message)
            else:
                _print(f"warning: {message}")

    def _report_lost_rank(self, rank: int, how: str) -> None:
        """Report a lost rank, what it was doing, and the collective that this rank is waiting in."""
        activity, own = self._watchdog.last_activity(rank), self._activity.report()
        text = f"{self._names[rank]} {how}"
        if activity:
            text += f"; it was in {activity}"
        if own.waiting_for:
            text += f"; rank {self.rank} is waiting in {own.call} of {own.location}"
        self._report_loss(text)

    def _report_loss(self, message: str) -> None:
        if self.lost is not None or self._leave_deadline < math.inf:
            return
        self.lost = message
        _print(f"error: {message}")
        if self.rank == 0:
            for peer in self._peers.values():
                peer.send({"kind": "lost", "message": message})
        self._loss_reported.set()


def _describe(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it exited with status {0 if error.code is None else error.code!r} before the other ranks had finished"
    text = " ".join(f"{type(error).__name__}: {error}".split()) if str(error) else type(error).__name__
    return text[:_MAX_REASON]


def _print(line: str) -> None:
    # Not through sys.stderr: a stuck main thread may hold its lock. The newline keeps a progress bar's line intact.
    start = "\n" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{start}{line}\n".encode(errors="backslashreplace"))


def _exit() -> None:
    for stream in (sys.stdout, sys.stderr):
        # In a thread, since flushing waits for the stream's lock, which a stuck main thread may hold.
        flusher = threading.Thread(target=_flush, args=(stream,), daemon=True)
        flusher.start()
        flusher.join(1.0)
    leave(PEER_LOST_EXIT_CODE)


def _flush(stream: object) -> None:
    with contextlib.suppress(Exception):
        stream.flush()  # type: ignore[attr-defined]
