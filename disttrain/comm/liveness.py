"""A guard that notices a dead, stopped or unreachable peer, whatever the engine.

Engines differ in what they do when a worker dies: gloo fails at once, MPI and Horovod may wait for ever inside C code. So
every rank keeps a small TCP connection to rank 0, watched by a thread. When one ends without a goodbye, or is silent for
too long, rank 0 tells everyone which rank was lost. Each survivor prints that in one line at once (launchers kill the
survivors soon after), and ends with code 13 if its main thread, which may be stuck in the engine, does not react.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from disttrain.comm.star import BrokenConnectionError, Connection, Group, Message, connect
from disttrain.errors import PEER_LOST_EXIT_CODE, PeerLostError, UserError

if TYPE_CHECKING:
    from typing_extensions import Self

_BEATS_PER_SILENCE = 6
_MAX_REASON = 500
# An engine's error is often the echo of a peer's death; the guard's own news of it may take this long to arrive.
_ECHO_SECONDS = 2.0


class Guard:
    """Watches the other ranks. All ranks construct it together, right after the communicator.

    As a context manager it also tells the others why this rank leaves (an exception, ``sys.exit``); without one, an
    unhandled exception is told through ``sys.excepthook`` and a normal end of the program is a goodbye.

    Args:
        group: the communicator.
        silence: seconds without a sign of life (six are sent in that time) after which a rank counts as lost.
        grace: seconds that the main thread has, once a rank is lost, to call ``check`` or end. Then the process ends
            with code 13.

    Attributes:
        lost: which rank was lost and how, or None.
        warning: why this guard cannot watch, or None (printed by rank 0). Alike on all ranks.
    """

    def __init__(self, group: Group, silence: float = 30.0, grace: float = 10.0) -> None:
        self.rank = group.rank
        self.lost: str | None = None
        self.warning: str | None = None
        self._silence, self._interval, self._grace = silence, silence / _BEATS_PER_SILENCE, grace
        self._news, self._noticed, self._closing = threading.Event(), threading.Event(), threading.Event()
        self._peers: dict[int, Connection] = {}
        if group.world_size == 1:
            return
        self._names = [
            f"rank {rank} (host {host}, pid {pid})"
            for rank, (host, pid) in enumerate(group.all_gather_object([socket.gethostname(), os.getpid()]))
        ]
        self._peers, self.warning = connect(group)
        if self.warning is not None:
            if self.rank == 0:
                _print(
                    f"warning: a worker that dies will not be noticed: {self.warning}. Export GLOO_SOCKET_IFNAME=<the "
                    "network interface that joins the hosts> on all of them"
                )
            return
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="disttrain-guard", daemon=True)
        self._previous_hook, sys.excepthook = sys.excepthook, self._on_unhandled
        atexit.register(self.close)
        # A forked child (a DataLoader's worker) would hold the connections open after its parent's death.
        os.register_at_fork(after_in_child=self._drop)
        self._thread.start()

    def check(self) -> None:
        """Raise PeerLostError if a rank was lost (its message has been printed already)."""
        if self.lost is not None:
            self._noticed.set()
            raise PeerLostError(self.lost)

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank leaves because of ``error``.

        Raises:
            PeerLostError: the error is the consequence of another rank's loss.
        """
        if not self._peers or self._closing.is_set():
            return
        if isinstance(error, Exception) and not isinstance(error, UserError | PeerLostError):
            self._news.wait(_ECHO_SECONDS)
        if self.lost is not None:
            self._noticed.set()
            raise PeerLostError(self.lost) from error
        self._leave({"kind": "failed", "reason": _describe(error)})

    def close(self) -> None:
        """Say goodbye: this rank's end from here on is no loss."""
        if self._peers and not self._closing.is_set():
            self._noticed.set()
            self._leave({"kind": "goodbye"})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
        self.close()

    def _leave(self, message: Message) -> None:
        self._closing.set()
        for peer in list(self._peers.values()):
            peer.send(message)
            peer.finish()
        self._wake.send(b"x")
        if self.lost is None:
            self._thread.join(1.0)
        atexit.unregister(self.close)
        if sys.excepthook == self._on_unhandled:
            sys.excepthook = self._previous_hook

    def _drop(self) -> None:
        """In a forked child: this is no rank."""
        for peer in self._peers.values():
            peer.close()
        self._closing.set()

    def _on_unhandled(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            self.fail(error)
        except PeerLostError:
            # Reported already. No orderly exit: the engine's own would wait for the lost rank.
            _exit()
        self._previous_hook(kind, error, trace)

    def _watch(self) -> None:
        """The thread: read, send signs of life, count silence."""
        # The watch's own time: it stands still while this process does (a suspended job, a debugger), so that on waking
        # the others are not taken for dead because of our sleep.
        watched, previous, last_beat = 0.0, time.monotonic(), 0.0
        heard = dict.fromkeys(self._peers, 0.0)
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while not self._closing.is_set() and heard:
                events = selector.select(self._interval)
                now = time.monotonic()
                watched += min(now - previous, self._interval)
                previous = now
                for key, _ in events:
                    if key.data is None:
                        continue
                    heard[key.data] = watched
                    if self._said_goodbye(key.data):
                        selector.unregister(key.fileobj)
                        del heard[key.data]
                if watched - last_beat >= self._interval:
                    last_beat = watched
                    for rank in heard:
                        self._peers[rank].send({"kind": "alive"})
                    silent = [rank for rank, moment in heard.items() if watched - moment > self._silence]
                    if silent:
                        self._lose(silent[0], f"was lost: it gave no sign of life for {self._silence:g} s")
                if self.lost is not None:
                    return self._end()
        return None

    def _said_goodbye(self, rank: int) -> bool:
        try:
            messages = self._peers[rank].receive()
        except BrokenConnectionError:
            if not self._closing.is_set():
                self._lose(rank, "was lost: its process ended or its connection broke")
            return True
        for message in messages:
            match message.get("kind"):
                case "goodbye":
                    return True
                case "failed":
                    self._lose(rank, f"failed: {message.get('reason')}")
                case "lost":
                    self._lose_as_told(str(message.get("message")))
        return False

    def _lose(self, rank: int, what: str) -> None:
        self._lose_as_told(f"{self._names[rank]} {what}")

    def _lose_as_told(self, message: str) -> None:
        if self.lost is not None:
            return
        self.lost = message
        _print(f"error: {message}")
        if self.rank == 0:
            for peer in self._peers.values():
                peer.send({"kind": "lost", "message": message})
        self._news.set()

    def _end(self) -> None:
        if not self._noticed.wait(self._grace):
            _exit()


def _describe(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it left with exit status {0 if error.code is None else error.code!r} before the others were done"
    text = " ".join(f"{type(error).__name__}: {error}".split()) if str(error) else type(error).__name__
    return text[:_MAX_REASON]


def _print(line: str) -> None:
    # Past sys.stderr, whose lock the main thread may hold for ever. A progress bar's line is left alone.
    start = "\n" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{start}{line}\n".encode())


def _exit() -> None:
    for stream in (sys.stdout, sys.stderr):
        # Flushing waits for the stream's lock, which a stuck main thread may hold.
        flusher = threading.Thread(target=_flush, args=(stream,), daemon=True)
        flusher.start()
        flusher.join(1.0)
    os._exit(PEER_LOST_EXIT_CODE)


def _flush(stream: object) -> None:
    with contextlib.suppress(Exception):
        stream.flush()  # type: ignore[attr-defined]
