"""The communicator: how tensors travel between ranks, whatever engine carries them.

An engine supplies four primitives over flat, contiguous buffers. Everything that must be alike on all of them - shapes,
empty and non-contiguous tensors, means, half precision, sizes that differ by rank - is decided here, once.
"""

from __future__ import annotations

import atexit
import copy
import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch

from disttrain.collectives import AllGather, AllReduce, AllToAll, Broadcast, Collective, Group, ReduceOp, Result
from disttrain.comm.dtypes import REDUCIBLE, carrier, reduce_rows
from disttrain.comm.liveness.activity import Activity, TracedWork
from disttrain.comm.nodes import describe, partitions
from disttrain.comm.work import CompletedWork, DeferredWork, Work
from disttrain.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

    from disttrain.comm.liveness.guard import Guard

EngineOp = Literal["sum", "min", "max"]


class Communicator(ABC):
    """One rank's end of the wire. Ranks must start the same collectives in the same order.

    Attributes:
        rank, world_size: this worker among all workers.
        local_rank, local_size: this worker among those of its host.
        device: where this rank's model lives.
        guard: what notices the loss of another rank; None where there is nobody to lose.
        shares_order: whether a collective of this channel (see ``channel``) has to wait for those that were started
            before it on other channels.
    """

    engine: str
    rank: int
    world_size: int
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
        """What this rank is doing, which the guard tells the others: steps, phases, collectives."""
        return Activity()

    # What an engine supplies: flat contiguous tensors in, flat tensors out. All but ``_all_reduce`` are given uint8,
    # int32 or int64, whatever the collective's dtype.

    @abstractmethod
    def _all_reduce(self, flat: torch.Tensor, op: EngineOp) -> Work[torch.Tensor]:
        """Reduce ``flat`` in place."""

    @abstractmethod
    def _all_gather(self, flat: torch.Tensor, sizes: Sequence[int]) -> Work[torch.Tensor]:
        """All ranks' elements one after another; ``sizes[i]`` elements come from rank i."""

    @abstractmethod
    def _all_to_all(
        self, flat: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]
    ) -> Work[torch.Tensor]:
        """Send the i-th stretch of ``flat`` to rank i; the stretches received, one after another."""

    @abstractmethod
    def _broadcast(self, flat: torch.Tensor, root: int) -> Work[torch.Tensor]:
        """Overwrite ``flat`` with the root's."""

    def _reduces_natively(self, dtype: torch.dtype) -> bool:
        """Whether ``_all_reduce`` takes this dtype. If not, the base sums by all-to-all and all-gather."""
        return dtype in REDUCIBLE

    @property
    def control_device(self) -> torch.device:
        """Where small tensors for agreement live."""
        return torch.device("cpu")

    def _narrow(self, parts: Sequence[Sequence[int]], own: int) -> None:
        """Become an end of the wire of one part of the ranks, ``parts[own]``; ``parts`` is alike on all ranks.

        Called on a copy of the communicator, on all ranks, with ``rank`` and ``world_size`` set to the part's.
        """
        raise UserError(f"engine {self.engine!r} has no groups of ranks")

    def _open_channel(self, is_small: bool) -> None:  # noqa: B027 - where there is one order for all, nothing is to do
        """Become an end of a new wire between the same ranks. Called on a copy of the communicator, on all ranks."""

    def on_hosts_changed(self, call: Callable[[], None]) -> None:  # noqa: B027 - few launchers do
        """Have ``call`` called, in another thread and on one rank, when the launcher brings or takes away hosts."""

    def _close(self) -> None:  # noqa: B027 - an engine with nothing to release needs no override
        """Leave the engine's group."""

    # Starting collectives.

    @overload
    def start(self, collective: AllReduce | Broadcast, *, account: object = None) -> Work[torch.Tensor]: ...
    @overload
    def start(self, collective: AllGather | AllToAll, *, account: object = None) -> Work[list[torch.Tensor]]: ...
    @overload
    def start(self, collective: Collective, *, account: object = None) -> Work[Result]: ...
    def start(self, collective: Collective, *, account: object = None) -> Work[Result]:
        """Start a collective and return at once.

        Args:
            collective: what to carry out; all ranks of its group start the same ones in the same order.
            account: what it is for, to be named (by its ``str``) where a rank is late for it.

        Raises:
            ValueError: the dtype cannot be reduced by this operation, the root is no rank, sizes are not those of this
                rank, or the number of chunks is not the group's size.
            UserError: the group is not the world, and nodes differ in their number of ranks.
        """
        call = self.activity.starts(type(collective).__name__, account)
        try:
            work = self.group(collective.group)._carry(collective)
        except RuntimeError:
            self.activity.begins_to_wait(call)  # the engine's error leaves a note, as one in waiting does
            raise
        return work if isinstance(work, CompletedWork) else TracedWork(work, self.activity, call)

    def channel(self, *, is_small: bool = False) -> Communicator:
        """Another wire between the same ranks: its collectives have an order of their own, and match no others.

        To be called by all ranks at the same point of their programs. It lives as long as this communicator, is closed
        with it, and may have groups of its own.

        Args:
            is_small: it will carry a few numbers at a time, so an engine need not give it means for more.
        """
        if self.world_size == 1:
            return self
        _ = self.activity  # one, also for the channel
        self._num_channels += 1
        channel = copy.copy(self)
        self._channels = (*self._channels, channel)
        channel.guard, channel._groups, channel._channels = None, {}, ()
        channel._open_channel(is_small)
        return channel

    def group(self, name: Group) -> Communicator:
        """The communicator of a group: its ``rank`` and ``world_size`` are those within the group.

        The groups are made when one is first asked for, by all ranks at the same point of their programs. They live as
        long as this communicator and are closed with it.

        Raises:
            UserError: nodes differ in their number of ranks, or the engine cannot make groups.
        """
        if name == "world":
            return self
        if not self._groups:
            parts = partitions(self.all_gather_object(describe(self.local_rank)))
            self._groups = {group: self._part(ranks) for group, ranks in parts.items()}
        return self._groups[name]

    def _part(self, parts: Sequence[Sequence[int]]) -> Communicator:
        if len(parts) == 1:
            return self
        own = next(index for index, ranks in enumerate(parts) if self.rank in ranks)
        part = copy.copy(self)
        part.rank, part.world_size, part.guard = parts[own].index(self.rank), len(parts[own]), None
        if part.world_size > 1:  # one rank alone needs no engine
            part._narrow(parts, own)
        return part

    def _carry(self, collective: Collective) -> Work[Result]:
        match collective:
            case AllReduce(tensor, op):
                return self._start_all_reduce(tensor, op)
            case AllGather(tensor, same_size, _, sizes):
                return self._start_all_gather(tensor, same_size, sizes)
            case AllToAll(chunks, same_size, _, sizes):
                return self._start_all_to_all(chunks, same_size, sizes)
            case Broadcast(tensor, root):
                if not 0 <= root < self.world_size:
                    raise ValueError(f"root must be a rank, 0 to {self.world_size - 1}; got {root}")
                if self.world_size == 1 or tensor.numel() == 0:
                    return CompletedWork(tensor)
                return _then(
                    self._broadcast(carrier(tensor), root), lambda result: result.view(tensor.dtype).view(tensor.shape)
                )

    def _start_all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> Work[torch.Tensor]:
        if tensor.dtype == torch.bool or tensor.is_complex():
            raise ValueError(f"all_reduce takes integers and real floats, not {tensor.dtype}: convert it first")
        if tensor.dtype == torch.uint64 and op != "sum":
            raise ValueError(f"the {op} of uint64 is not defined: convert it first")
        if op == "mean" and not tensor.is_floating_point():
            raise ValueError(f"the mean of {tensor.dtype} is not defined: use op='sum', or a floating dtype")
        if self.world_size == 1 or tensor.numel() == 0:
            return CompletedWork(tensor)
        shape = tensor.shape
        flat = tensor.contiguous().view(-1)
        if not self._reduces_natively(flat.dtype):
            return _then(self._all_reduce_by_exchange(flat, op), lambda result: result.view(shape))
        if op != "mean":
            return _then(self._all_reduce(flat, op), lambda result: result.view(shape))
        if flat.itemsize < 4:
            # Half precision overflows as a sum although the mean would fit: divide first. For a power of two exact.
            return _then(self._all_reduce(flat.div_(self.world_size), "sum"), lambda result: result.view(shape))
        return _then(self._all_reduce(flat, "sum"), lambda result: result.div_(self.world_size).view(shape))

    def _all_reduce_by_exchange(self, flat: torch.Tensor, op: ReduceOp) -> Work[torch.Tensor]:
        """All-to-all, a local reduction in a wider dtype, all-gather: as many bytes as a ring, one rounding."""
        chunk = math.ceil(flat.numel() / self.world_size)
        padded = flat.new_zeros(chunk * self.world_size)
        padded[: flat.numel()] = flat
        sizes = [chunk] * self.world_size
        first = self._exchange(padded, sizes, sizes)

        def finish() -> torch.Tensor:
            rows = first.wait().view(self.world_size, chunk)
            reduced = reduce_rows(rows, op)
            return self._gather(reduced, sizes).wait()[: flat.numel()]

        return DeferredWork(finish)

    def _start_all_gather(
        self, tensor: torch.Tensor, same_size: bool, sizes: Sequence[int] | None
    ) -> Work[list[torch.Tensor]]:
        rows, row_shape = _rows(tensor)
        counts = [rows] * self.world_size if sizes is None else list(sizes)
        self._check_sizes(counts, rows)
        if self.world_size == 1:
            return CompletedWork([tensor])
        flat = tensor.contiguous().view(-1)
        width = math.prod(row_shape)

        def split(result: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
            parts = result.split([count * width for count in counts])
            if tensor.dim() == 0:
                return [part.view(()) for part in parts]
            return [part.view(count, *row_shape) for part, count in zip(parts, counts, strict=True)]

        if same_size or tensor.dim() == 0 or sizes is not None:
            if sum(counts) * width == 0:
                return CompletedWork(split(flat, counts))
            return _then(self._gather(flat, [n * width for n in counts]), lambda result: split(result, counts))
        size_work = self._all_gather(self._control_tensor([rows]), [1] * self.world_size)

        def finish() -> list[torch.Tensor]:
            counts: list[int] = size_work.wait().tolist()
            if sum(counts) * width == 0:
                return split(flat.new_empty(0), counts)
            return split(self._gather(flat, [count * width for count in counts]).wait(), counts)

        return DeferredWork(finish)

    def _start_all_to_all(
        self, chunks: list[torch.Tensor], same_size: bool, sizes: Sequence[int] | None
    ) -> Work[list[torch.Tensor]]:
        if len(chunks) != self.world_size:
            raise ValueError(f"all_to_all needs one chunk for each of {self.world_size} ranks; got {len(chunks)}")
        if self.world_size == 1:
            return CompletedWork(list(chunks))
        _, row_shape = _rows(chunks[0])
        width = math.prod(row_shape)
        send = [_rows(chunk)[0] for chunk in chunks]
        flat = torch.cat([chunk.reshape(-1) for chunk in chunks])

        def exchange(receive: Sequence[int]) -> Work[torch.Tensor]:
            return self._exchange(flat, [n * width for n in send], [n * width for n in receive])

        def split(result: torch.Tensor, receive: Sequence[int]) -> list[torch.Tensor]:
            parts = result.split([count * width for count in receive])
            return [part.view(count, *row_shape) for part, count in zip(parts, receive, strict=True)]

        if same_size or sizes is not None:
            receive = send if sizes is None else list(sizes)
            self._check_sizes(receive, send[self.rank])
            return _then(exchange(receive), lambda result: split(result, receive))
        ones = [1] * self.world_size
        size_work = self._all_to_all(self._control_tensor(send), ones, ones)

        def finish() -> list[torch.Tensor]:
            receive: list[int] = size_work.wait().tolist()
            return split(exchange(receive).wait(), receive)

        return DeferredWork(finish)

    def _gather(self, flat: torch.Tensor, sizes: Sequence[int]) -> Work[torch.Tensor]:
        moved = carrier(flat)
        width = flat.itemsize // moved.itemsize
        work = self._all_gather(moved, [size * width for size in sizes])
        return _then(work, lambda result: result.view(flat.dtype))

    def _exchange(self, flat: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> Work[torch.Tensor]:
        moved = carrier(flat)
        width = flat.itemsize // moved.itemsize
        work = self._all_to_all(moved, [size * width for size in send], [size * width for size in receive])
        return _then(work, lambda result: result.view(flat.dtype))

    def _check_sizes(self, sizes: Sequence[int], own: int) -> None:
        if len(sizes) != self.world_size or sizes[self.rank] != own:
            raise ValueError(f"sizes={list(sizes)} do not fit rank {self.rank} of {self.world_size}, which has {own}")

    def _control_tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.control_device)

    # The blocking spelling, for everything that is not a gradient; arguments are left untouched.

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
        # Read back: on a GPU, to have waited is to have put the wait into the stream.
        self.start(AllReduce(self._control_tensor([1]), "sum")).wait().item()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order. Values are what JSON can hold: nothing that arrives is ever executed."""
        encoded = bytearray(json.dumps(value).encode())
        tensor = torch.frombuffer(encoded, dtype=torch.uint8).to(self.control_device)
        return [json.loads(bytes(part.cpu().numpy())) for part in self.all_gather(tensor)]

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """The root's value, on every rank (JSON values)."""
        return self.all_gather_object(value if self.rank == root else None)[root]

    def close(self) -> None:
        """Say goodbye to the others and leave, as a program does at its end. Pending work must have been waited for."""
        atexit.unregister(self.leave_at_exit)
        if self.guard is not None:
            self.guard.close()
        self._close()

    def leave_at_exit(self) -> None:
        """``init`` has this called at the end of the program: an engine left to the interpreter's end may abort."""
        failed = getattr(sys, "last_value", None) is not None or (
            self.guard is not None and self.guard.lost is not None
        )
        if not failed:  # the engine's orderly end could wait for a rank that is gone
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # The engine is left as it is: closing it could wait for a rank that is gone.
        atexit.unregister(self.leave_at_exit)
        if self.guard is not None:
            self.guard.fail(error)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, world_size={self.world_size}, device={str(self.device)!r})"


def _rows(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """Length along dimension 0 and the shape of one row; a 0-d tensor is one row of one element."""
    return (tensor.shape[0], tuple(tensor.shape[1:])) if tensor.dim() else (1, ())


def _then(work: Work[Any], change: Callable[[Any], Any]) -> Work[Any]:
    return cast("Work[Any]", DeferredWork(lambda: change(work.wait())))
