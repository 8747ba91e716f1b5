"""A guard that notices a dead, stopped or unreachable peer, whatever the engine.

Engines differ in what they do when a worker dies: gloo fails at once, MPI and Horovod may wait for ever inside C code.
So every rank keeps a small TCP connection to rank 0, watched by a thread. When one ends without a goodbye, or is silent
for too long, rank 0 tells everyone which rank was lost. Each survivor prints that in one line at once (launchers kill
the survivors soon after), and ends with code 13 if its main thread, which may be stuck in the engine, does not react.

With every sign of life a rank tells what it is doing (``comm.activity``). So rank 0 also knows who is alive and yet
holds up a collective that the others wait in, and who is slow (``comm.watchdog``).
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
from disttrain.comm.liveness.connections import BrokenConnectionError, Connection, Group, Message, connect
from disttrain.comm.liveness.watchdog import Watchdog
from disttrain.errors import PEER_LOST_EXIT_CODE, PeerLostError, UserError

if TYPE_CHECKING:
    from typing_extensions import Self

_BEATS_PER_SILENCE = 6
_MAX_REASON = 500
# An engine's error is often the echo of a peer's death; the guard's own news of it may take this long to arrive.
_ECHO_SECONDS = 2.0
_FAREWELL_SECONDS = 1.0


class Guard:
    """Watches the other ranks. All ranks construct it together, right after the communicator.

    As a context manager it also tells the others why this rank leaves (an exception, ``sys.exit``); without one, an
    unhandled exception is told through ``sys.excepthook`` and a normal end of the program is a goodbye.

    Args:
        group: the communicator.
        silence: seconds without a sign of life (six are sent in that time) after which a rank counts as lost.
        grace: seconds that the main thread has, once a rank is lost, to call ``check`` or end. Then the process ends
            with code 13.
        activity: what this rank is doing; None: it does not tell.
        stall: seconds that ranks may wait in a collective that another one, alive, has not started; None: any time.
        ends_stalled: whether that ends all ranks, as a loss does. If not, rank 0 prints a warning.
        late: seconds after which rank 0 prints a warning that ranks wait so; None: it prints none.
        slow: a rank whose steps take so many times what those of the others do is warned about; None: none is.

    Attributes:
        lost: which rank was lost and how, or None.
        straggler: on rank 0, the slowest rank and how many times what the others need its steps take; None if unknown.
        warning: why this guard cannot watch, or None (printed by rank 0). Alike on all ranks.
    """

    def __init__(
        self,
        group: Group,
        silence: float = 30.0,
        grace: float = 10.0,
        activity: Activity | None = None,
        stall: float | None = None,
        ends_stalled: bool = True,
        slow: float | None = None,
        late: float | None = None,
    ) -> None:
        self.rank = group.rank
        self.lost: str | None = None
        self.warning: str | None = None
        self.straggler: tuple[int, float] | None = None
        self._silence, self._grace = silence, grace
        self._interval = min(silence, stall or math.inf, late or math.inf) / _BEATS_PER_SILENCE
        self._activity, self._ends_stalled = activity or Activity(), ends_stalled
        self._news, self._noticed = threading.Event(), threading.Event()
        self._leave_by = math.inf
        self._troubled = False
        self._peers: dict[int, Connection] = {}
        if group.world_size == 1:
            return
        self._names = [
            f"rank {rank} (host {host}, pid {pid})"
            for rank, (host, pid) in enumerate(group.all_gather_object([socket.gethostname(), os.getpid()]))
        ]
        self._watchdog = Watchdog(self._names, stall, slow, late)
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

    @property
    def metrics(self) -> dict[str, float]:
        """``straggler/rank`` and ``straggler/ratio``, if known."""
        if self.straggler is None:
            return {}
        rank, ratio = self.straggler
        return {"straggler/rank": rank, "straggler/ratio": ratio}

    def check(self) -> None:
        """Raise PeerLostError if a rank was lost (its message has been printed already)."""
        if self.lost is not None:
            self._noticed.set()
            raise PeerLostError(self.lost)

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank leaves because of ``error``; ``sys.exit(0)`` is a goodbye.

        Raises:
            PeerLostError: the error is the consequence of another rank's loss, or of its end.
        """
        if not self._peers:
            return
        if isinstance(error, SystemExit) and error.code in (None, 0):
            self.close()
            return
        if isinstance(error, Exception) and not isinstance(error, UserError | PeerLostError):
            self._troubled = True
            self._wake.send(b"x")
            self._news.wait(_ECHO_SECONDS)
        if self.lost is not None and not isinstance(error, UserError):
            self._noticed.set()
            raise PeerLostError(self.lost) from error
        self._leave({"kind": "failed", "reason": _describe(error), "report": self._activity.report()})

    def close(self) -> None:
        """Say goodbye: this rank's end from here on is no loss."""
        if self._peers:
            self._leave({"kind": "goodbye", "report": self._activity.report()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
        self.close()

    def _leave(self, message: Message) -> None:
        self._noticed.set()
        self._leave_by = time.monotonic() + _FAREWELL_SECONDS
        for peer in self._peers.values():
            peer.send(message)
            peer.finish()
        self._wake.send(b"x")
        # The thread reads on until the others hang up: closing with unread data would reset the connection, and our
        # last words with it.
        self._thread.join(2 * _FAREWELL_SECONDS)
        self._drop()
        atexit.unregister(self.close)
        if sys.excepthook == self._on_unhandled:
            sys.excepthook = self._previous_hook

    def _drop(self) -> None:
        """Be no rank any more, without a word: also in a forked child."""
        for peer in self._peers.values():
            peer.close()
        self._wake.close()
        self._woken.close()
        self._peers = {}

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
        watched, previous, next_beat = 0.0, time.monotonic(), 0.0
        heard = dict.fromkeys(self._peers, 0.0)
        peers = dict(self._peers)
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for rank, peer in peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while self.lost is None and previous < self._leave_by:
                leaving = self._leave_by < math.inf
                if leaving and not heard:
                    break
                events = selector.select(_FAREWELL_SECONDS if leaving else self._interval)
                now = time.monotonic()
                watched += min(now - previous, self._interval)
                previous = now
                for rank in [key.data for key, _ in events]:
                    if rank is None:
                        self._woken.recv(1)
                        continue
                    heard[rank] = watched
                    if self._has_left(rank, peers[rank]):
                        selector.unregister(peers[rank])
                        peers[rank].close()
                        del heard[rank]
                if self._troubled and not leaving:
                    self._troubled = False
                    report = self._activity.report()
                    self._watchdog.hear(self.rank, report)
                    self._watchdog.trouble(self.rank)
                    for rank in heard:
                        peers[rank].send({"kind": "trouble", "report": report})
                    self._judge_leaving()
                if watched >= next_beat:
                    next_beat = watched + 0.9 * self._interval
                    report = self._activity.report()
                    self._watchdog.hear(self.rank, report)
                    for rank in heard:
                        peers[rank].send({"kind": "alive", "report": report})
                    silent = [rank for rank, moment in heard.items() if watched - moment > self._silence]
                    if silent:
                        self._lose_rank(silent[0], f"was lost: no sign of life for {self._silence:g} s")
                    else:
                        self._judge_leaving()
                        if self.rank == 0 and self.lost is None:
                            self._judge()
        if self.lost is not None and not self._noticed.wait(self._grace):
            _exit()

    def _has_left(self, rank: int, peer: Connection) -> bool:
        try:
            messages = peer.receive()
        except BrokenConnectionError:
            self._lose_rank(rank, "was lost: its process ended or its connection broke")
            return True
        for message in messages:
            self._watchdog.hear(rank, message.get("report"))
            match message.get("kind"):
                case "goodbye":
                    self._watchdog.end(rank)
                    return True
                case "trouble":
                    self._watchdog.trouble(rank)
                    self._judge_leaving()
                case "failed":
                    self._lose_rank(rank, f"failed: {message.get('reason')}")
                    return True  # it knows, and prints its own error
                case "lost":
                    self._lose(str(message.get("message")))
        return False

    def _judge_leaving(self) -> None:
        """Has a rank ended without the others? Rank 0 sees it of all, and every rank of rank 0."""
        if (message := self._watchdog.abandoned()) is not None:
            self._lose(message)

    def _judge(self) -> None:
        """On rank 0, with every beat: is one rank late for what the others wait in, is one slow?"""
        self.straggler = self._watchdog.slowest()
        if (message := self._watchdog.slow()) is not None:
            _print(f"warning: {message}")
        if (message := self._watchdog.late()) is not None:
            _print(f"warning: {message}")
        if (message := self._watchdog.stalled()) is not None:
            if self._ends_stalled:
                self._lose(message)
            else:
                _print(f"warning: {message}")

    def _lose_rank(self, rank: int, how: str) -> None:
        """Tell that a rank was lost, where it was, and what this one waits in for it."""
        doing, own = self._watchdog.doing(rank), self._activity.report()
        text = f"{self._names[rank]} {how}"
        if doing:
            text += f"; it was in {doing}"
        if own.waits:
            text += f"; rank {self.rank} waits in {own.call} of {own.where}"
        self._lose(text)

    def _lose(self, message: str) -> None:
        if self.lost is not None or self._leave_by < math.inf:
            return
        self.lost = message
        _print(f"error: {message}")
        if self.rank == 0:
            for peer in self._peers.values():
                peer.send({"kind": "lost", "message": message})
        self._news.set()


def _describe(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it left with exit status {0 if error.code is None else error.code!r} before the others were done"
    text = " ".join(f"{type(error).__name__}: {error}".split()) if str(error) else type(error).__name__
    return text[:_MAX_REASON]


def _print(line: str) -> None:
    # Past sys.stderr, whose lock the main thread may hold for ever. A progress bar's line is left alone.
    start = "\n" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{start}{line}\n".encode(errors="backslashreplace"))


def _exit() -> None:
    for stream in (sys.stdout, sys.stderr):
        # Flushing waits for the stream's lock, which a stuck main thread may hold.
        flusher = threading.Thread(target=_flush, args=(stream,), daemon=True)
        flusher.start()
        flusher.join(1.0)
    leave(PEER_LOST_EXIT_CODE)


def _flush(stream: object) -> None:
    with contextlib.suppress(Exception):
        stream.flush()  # type: ignore[attr-defined]
