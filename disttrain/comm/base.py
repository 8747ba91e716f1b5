"""The communicator: one rank's access to the others, with the same interface for all engines."""

from __future__ import annotations

import atexit
import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import torch

from disttrain.collectives import AllGather, AllReduce, AllToAll, Broadcast, Collective, Group, ReduceOp, Result
from disttrain.comm.launch.nodes import describe, partitions
from disttrain.comm.liveness.activity import Activity
from disttrain.comm.primitives import EngineOp, Primitives
from disttrain.comm.work import Work
from disttrain.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

    from disttrain.comm.launch.environment import Environment
    from disttrain.comm.liveness.guard import Guard


__all__ = ["Communicator", "EngineOp"]


class Communicator(Primitives):
    """One rank's access to the others. All ranks must start the same collectives in the same order.

    Attributes:
        engine: its name.
        rank, world_size: this worker among all workers.
        local_rank, local_size: this worker among those of its host.
        device: where this rank's model lives.
        guard: detects the loss of another rank; None in a world of one rank.
        shares_order: whether a collective on this channel (see ``channel``) waits for those that were started before
            it on other channels.
    """

    engine: str
    local_rank: int
    local_size: int
    device: torch.device
    guard: Guard | None = None
    shares_order = False
    _num_channels = 0
    _channels: tuple[Communicator, ...] = ()
    _groups: Mapping[Group, Communicator] = {}

    @cached_property
    def activity(self) -> Activity:
        """What this rank is doing - step, phase, collective - for the guard to report to the other ranks."""
        return Activity()

    # An engine overrides these where it can.

    @classmethod
    def join(cls, environment: Environment, device: torch.device, *, timeout: float, patience: float) -> Communicator:
        """Join the other workers. By default an engine is constructed from ``environment`` and ``device`` alone.

        Args:
            environment: what the launcher told this process.
            device: where this rank's model lives.
            timeout: seconds to wait for the other workers.
            patience: seconds after which a collective may time out, for engines that have timeouts.

        Raises:
            UserError: the other workers cannot be reached, or the engine does not fit the launcher.
        """
        return cls(environment, device)  # type: ignore[call-arg]

    def _enter_group(self, groups: Sequence[Sequence[int]], own: int) -> None:
        """Restrict this communicator to the ranks ``groups[own]``; ``groups`` is the same on all ranks.

        Called on a copy of the communicator, on all ranks, with ``rank`` and ``world_size`` set to those of the group.
        """
        raise UserError(f"engine {self.engine!r} has no groups of ranks")

    def _enter_channel(self, is_small: bool) -> None:
        """Switch this communicator to a new channel. Called on a copy of the communicator, on all ranks."""

    def on_hosts_changed(self, call: Callable[[], None]) -> None:
        """Have ``call`` called, in another thread and on one rank, when the launcher adds or removes hosts."""

    def _close(self) -> None:
        """Leave the engine's process group."""

    # Starting collectives.

    @overload
    def start(self, collective: AllReduce | Broadcast, *, account: object = None) -> Work[torch.Tensor]: ...
    @overload
    def start(self, collective: AllGather | AllToAll, *, account: object = None) -> Work[list[torch.Tensor]]: ...
    @overload
    def start(self, collective: Collective, *, account: object = None) -> Work[Result]: ...
    def start(self, collective: Collective, *, account: object = None) -> Work[Any]:
        """Start a collective without waiting for it.

        Args:
            collective: what to carry out. All ranks of its group start the same collectives in the same order.
            account: its purpose; messages about a rank that is late for it quote ``str(account)``.

        Raises:
            ValueError: the dtype cannot be reduced by this operation, the root is no rank, the sizes are not those of
                this rank, or the number of chunks is not the size of the group.
            UserError: the group is not the world, and nodes differ in their number of ranks.
        """
        call = self.activity.start_call(type(collective).__name__, account)
        try:
            work = self.group(collective.group)._dispatch(collective)
        except RuntimeError:
            self.activity.begin_wait(call)  # show this collective, as for an error of the engine while waiting
            raise
        return work if work.is_completed else work.traced(self.activity, call)

    def channel(self, *, is_small: bool = False) -> Communicator:
        """Return another channel between the same ranks. Its collectives have their own order, and match no others.

        To be called by all ranks at the same point of their programs. The channel lives as long as this communicator,
        is closed with it, and may have groups of its own.

        Args:
            is_small: the channel will carry a few numbers at a time, so an engine may give it fewer resources.
        """
        if self.world_size == 1:
            return self
        _ = self.activity  # created here, so that the channel shares it
        self._num_channels += 1
        channel = copy.copy(self)
        self._channels = (*self._channels, channel)
        channel.guard, channel._groups, channel._channels = None, {}, ()
        channel._enter_channel(is_small)
        return channel

    def group(self, name: Group) -> Communicator:
        """Return the communicator of a group. Its ``rank`` and ``world_size`` are those within the group.

        Groups are created when one is first asked for, by all ranks at the same point of their programs. They live as
        long as this communicator and are closed with it.

        Raises:
            UserError: nodes differ in their number of ranks, or the engine cannot create groups.
        """
        if name == "world":
            return self
        if not self._groups:
            partition = partitions(self.all_gather_object(describe(self.local_rank)))
            self._groups = {group: self._make_group(ranks) for group, ranks in partition.items()}
        return self._groups[name]

    def _make_group(self, groups: Sequence[Sequence[int]]) -> Communicator:
        if len(groups) == 1:
            return self
        own = next(index for index, ranks in enumerate(groups) if self.rank in ranks)
        group = copy.copy(self)
        group.rank, group.world_size, group.guard = groups[own].index(self.rank), len(groups[own]), None
        if group.world_size > 1:  # a single rank needs no engine
            group._enter_group(groups, own)
        return group

    # Blocking collectives, for everything but gradients. Arguments are left untouched.

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        return self.start(AllReduce(tensor.clone(), op)).wait()

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self.start(AllGather(tensor)).wait()

    def all_to_all(self, chunks: list[torch.Tensor]) -> list[torch.Tensor]:
        return self.start(AllToAll(chunks)).wait()

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        return self.start(Broadcast(tensor.clone(), root)).wait()

    def barrier(self) -> None:
        """Return when every rank has called it."""
        # On a GPU, waiting only orders streams; reading the result blocks the host.
        self.start(AllReduce(self._control_tensor([1]), "sum")).wait().item()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order. They are JSON, so nothing that is received is executed."""
        encoded = bytearray(json.dumps(value).encode())
        tensor = torch.frombuffer(encoded, dtype=torch.uint8).to(self.control_device)
        return [json.loads(bytes(part.cpu().numpy())) for part in self.all_gather(tensor)]

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Return the root's JSON value, on every rank."""
        return self.all_gather_object(value if self.rank == root else None)[root]

    # The end.

    def close(self) -> None:
        """Tell the other ranks that this one has finished, and leave. All work must have been waited for."""
        atexit.unregister(self.close_at_exit)
        if self.guard is not None:
            self.guard.close()
        self._close()

    def close_at_exit(self) -> None:
        """Close unless the program fails. ``init`` registers this: some engines abort if the interpreter ends first."""
        failed = getattr(sys, "last_value", None) is not None or (
            self.guard is not None and self.guard.lost is not None
        )
        if not failed:  # an orderly shutdown of the engine could wait for a rank that is gone
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # The engine is not closed: that could wait for a rank that is gone.
        atexit.unregister(self.close_at_exit)
        if self.guard is not None:
            self.guard.fail(error)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, world_size={self.world_size}, device={str(self.device)!r})"
