"""Virtual ranks in one process: a thread per rank, deterministic sums in rank order, and a simulated clock.

For tests (64 ranks on a laptop, with reproducible results) and for planning. The clock follows the alpha-beta cost
model: a message takes ``alpha`` seconds plus ``beta`` seconds per byte. Collectives use the network one at a time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from disttrain.comm.base import Communicator, EngineOp
from disttrain.comm.work import Work

R = TypeVar("R")


@dataclass
class _Round:
    """One collective: what the ranks contribute, and what they receive."""

    kind: str
    parts: dict[int, torch.Tensor] = field(default_factory=dict)
    sizes: dict[int, Sequence[int]] = field(default_factory=dict)
    results: list[torch.Tensor] | None = None
    started: float = 0.0
    ended: float = 0.0


@dataclass
class _Clock:
    now: float = 0.0


class SimulatedWorld:
    """State that the virtual ranks share.

    Args:
        world_size: number of ranks.
        alpha: seconds per message.
        beta: seconds per byte.
        timeout: real seconds that a rank waits for the others before it reports a deadlock.
        local_size: ranks per host. Default: all ranks are on one host.
        in_turns: whether only one rank computes at a time, see :func:`simulate`.
    """

    def __init__(
        self,
        world_size: int,
        alpha: float = 0.0,
        beta: float = 0.0,
        timeout: float = 60.0,
        local_size: int | None = None,
        in_turns: bool = False,
    ) -> None:
        self.world_size, self.alpha, self.beta, self.timeout = world_size, alpha, beta, timeout
        self.local_size = local_size or world_size
        self.changed = threading.Condition()
        self.turn = threading.Semaphore(1 if in_turns else world_size)  # released while a rank waits for others
        self.rounds: dict[int, _Round] = {}
        self.failures: list[BaseException] = []
        self.network_free_at = 0.0  # simulated seconds
        self._subworlds: dict[object, SimulatedWorld] = {}

    @property
    def failure(self) -> BaseException | None:
        """The exception of the first rank that failed."""
        return self.failures[0] if self.failures else None

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.failures.append(error)
            self.changed.notify_all()

    def subworld(self, key: object, num_ranks: int) -> SimulatedWorld:
        """Return the world of a group or channel. It has its own network, but shares failures with this world."""
        with self.changed:
            if key not in self._subworlds:
                world = SimulatedWorld(num_ranks, self.alpha, self.beta, self.timeout)
                world.changed, world.turn, world.failures = self.changed, self.turn, self.failures
                self._subworlds[key] = world
            return self._subworlds[key]

    def deposit(self, index: int, rank: int, kind: str, flat: torch.Tensor, sizes: Sequence[int], clock: float) -> None:
        """Contribute a rank's tensor to collective number ``index``. The last rank to do so carries it out."""
        with self.changed:
            current = self.rounds.setdefault(index, _Round(kind))
            if current.kind != kind:
                error = RuntimeError(
                    f"ranks disagree on collective {index}: {kind} on rank {rank}, {current.kind} on another"
                )
                self.fail(error)
                raise error
            current.parts[rank], current.sizes[rank] = flat, sizes
            current.started = max(current.started, clock)
            if len(current.parts) == self.world_size:
                self._carry_out(current)
                self.changed.notify_all()

    def collect(self, index: int, rank: int) -> tuple[torch.Tensor, float]:
        """Wait for collective number ``index``. Returns this rank's result, and the simulated time at which it ended.

        Raises:
            RuntimeError: another rank failed, or did not start the collective within the timeout.
        """
        done = self._is_done(index)
        if not done:
            self.turn.release()
            with self.changed:
                done = self.changed.wait_for(lambda: self._is_done(index), self.timeout)
            self.turn.acquire()
        with self.changed:
            current = self.rounds[index]
            if current.results is None:
                missing = sorted(set(range(self.world_size)) - set(current.parts))
                cause = f"ranks {missing} never started collective {index} ({current.kind})"
                raise RuntimeError(f"another rank failed: {self.failure!r}" if done else f"deadlock: {cause}")
            result, ended = current.results[rank], current.ended
            current.parts.pop(rank)
            if not current.parts:
                del self.rounds[index]
            return result, ended

    def _is_done(self, index: int) -> bool:
        return self.failure is not None or self.rounds[index].results is not None

    def _carry_out(self, current: _Round) -> None:
        kind = current.kind.split()[0]
        parts = [current.parts[rank] for rank in range(self.world_size)]
        num_messages, num_bytes = self.world_size - 1, 0.0
        if kind in ("sum", "min", "max"):
            total = _reduce(parts, kind)
            current.results = [part.copy_(total) for part in parts]  # in place, like real engines
            num_messages, num_bytes = 2 * num_messages, 2 * (self.world_size - 1) / self.world_size * total.nbytes
        elif kind == "all_gather":
            joined = torch.cat(parts)
            current.results = [joined.clone() for _ in parts]
            num_bytes = joined.nbytes - min(part.nbytes for part in parts)
        elif kind == "all_to_all":
            chunks = [part.split(list(current.sizes[rank])) for rank, part in enumerate(parts)]
            current.results = [torch.cat([sent[rank] for sent in chunks]) for rank in range(self.world_size)]
            num_bytes = max(result.nbytes for result in current.results)
        else:
            root = parts[int(current.kind.split()[1])].clone()
            current.results = [part.copy_(root) for part in parts]
            num_messages, num_bytes = math.ceil(math.log2(self.world_size)), root.nbytes
        start = max(current.started, self.network_free_at)
        current.ended = self.network_free_at = start + num_messages * self.alpha + num_bytes * self.beta


def _reduce(parts: list[torch.Tensor], kind: str) -> torch.Tensor:
    wide = torch.float32 if parts[0].dtype in (torch.float16, torch.bfloat16) else parts[0].dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        if kind == "sum":
            total += part
        else:
            total = (torch.minimum if kind == "min" else torch.maximum)(total, part.to(wide))
    return total.to(parts[0].dtype)


class SimulatedCommunicator(Communicator):
    """The communicator of one virtual rank."""

    engine = "simulated"

    def __init__(self, world: SimulatedWorld, rank: int) -> None:
        self.rank, self.world_size = rank, world.world_size
        self.local_rank, self.local_size = rank % world.local_size, world.local_size
        self.device = torch.device("cpu")
        self._clock = _Clock()  # shared with this rank's groups and channels
        self._world = world
        self._num_started = 0

    @property
    def clock(self) -> float:
        """Simulated time of this rank in seconds."""
        return self._clock.now

    def advance(self, seconds: float) -> None:
        """Add computation to the simulated time."""
        self._clock.now += seconds

    def _enter_group(self, groups: Sequence[Sequence[int]], own: int) -> None:
        self._world, self._num_started = self._world.subworld(tuple(groups[own]), len(groups[own])), 0

    def _enter_channel(self, is_small: bool) -> None:
        self._world, self._num_started = self._world.subworld(("channel", self._num_channels), self.world_size), 0

    def _submit(self, kind: str, flat: torch.Tensor, sizes: Sequence[int] = ()) -> Work[torch.Tensor]:
        index, self._num_started = self._num_started, self._num_started + 1
        self._world.deposit(index, self.rank, kind, flat, sizes, self.clock)

        def finish() -> torch.Tensor:
            result, ended = self._world.collect(index, self.rank)
            self._clock.now = max(self._clock.now, ended)
            return result

        return Work(finish)

    def _all_reduce(self, flat: torch.Tensor, op: EngineOp) -> Work[torch.Tensor]:
        return self._submit(f"{op} {flat.dtype} x {flat.numel()}", flat)

    def _all_gather(self, flat: torch.Tensor, sizes: Sequence[int]) -> Work[torch.Tensor]:
        return self._submit(f"all_gather {flat.dtype} x {list(sizes)}", flat)

    def _all_to_all(
        self, flat: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]
    ) -> Work[torch.Tensor]:
        return self._submit(f"all_to_all {flat.dtype}", flat, send_sizes)

    def _broadcast(self, flat: torch.Tensor, root: int) -> Work[torch.Tensor]:
        return self._submit(f"broadcast {root} {flat.dtype} x {flat.numel()}", flat)


def simulate(
    world_size: int,
    run: Callable[[SimulatedCommunicator], R],
    *,
    alpha: float = 0.0,
    beta: float = 0.0,
    timeout: float = 60.0,
    local_size: int | None = None,
    in_turns: bool = False,
) -> list[R]:
    """Call ``run(comm)`` on every virtual rank, each in its own thread. Returns the results in rank order.

    The ranks share one process, and with it torch's global random generator: use a generator per rank instead.

    Args:
        world_size: number of ranks.
        run: the program of a rank.
        alpha, beta: simulated seconds per message and per byte. Each group and channel has its own network.
        timeout: real seconds that a rank waits for the others before it reports a deadlock.
        local_size: ranks per virtual host. Default: all ranks are on one host.
        in_turns: let only one rank compute at a time, until it waits for a collective. This is faster: with 16 ranks,
            threads that contend for the GIL at every call of torch lose a third of their time. But ranks must not wait
            for each other by any other means.

    Raises:
        BaseException: the exception of the first rank that failed. The other ranks are released.
    """
    world = SimulatedWorld(world_size, alpha, beta, timeout, local_size, in_turns)
    results: dict[int, R] = {}

    def work(rank: int) -> None:
        try:
            with world.turn:
                results[rank] = run(SimulatedCommunicator(world, rank))
        except BaseException as error:
            world.fail(error)

    threads = [
        threading.Thread(target=work, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if world.failure is not None:
        raise world.failure
    return [results[rank] for rank in range(world_size)]
