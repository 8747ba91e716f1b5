"""Collectives in terms of four primitives over flat, contiguous buffers, which is all that an engine supplies.

Everything that must be the same on all engines is decided here once: shapes, empty and non-contiguous tensors, means,
half precision, sizes that differ by rank, and dtypes that an engine cannot reduce.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch

from disttrain.collectives import AllGather, AllReduce, AllToAll, Broadcast, Collective, ReduceOp
from disttrain.comm.dtypes import REDUCIBLE, carrier, reduce_rows
from disttrain.comm.work import Work

EngineOp = Literal["sum", "min", "max"]


class Primitives(ABC):
    """What an engine supplies, and the collectives that follow from it.

    Primitives take and return flat, contiguous tensors. All but ``_all_reduce`` get uint8, int32 or int64, for any
    dtype of the collective.
    """

    rank: int
    world_size: int

    @abstractmethod
    def _all_reduce(self, flat: torch.Tensor, op: EngineOp) -> Work[torch.Tensor]:
        """Reduce ``flat`` in place."""

    @abstractmethod
    def _all_gather(self, flat: torch.Tensor, sizes: Sequence[int]) -> Work[torch.Tensor]:
        """Concatenate the elements of all ranks; ``sizes[i]`` elements come from rank i."""

    @abstractmethod
    def _all_to_all(
        self, flat: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]
    ) -> Work[torch.Tensor]:
        """Send the i-th part of ``flat`` to rank i, and concatenate the parts received."""

    @abstractmethod
    def _broadcast(self, flat: torch.Tensor, root: int) -> Work[torch.Tensor]:
        """Overwrite ``flat`` with the root's."""

    def _reduces_natively(self, dtype: torch.dtype) -> bool:
        """Whether ``_all_reduce`` takes this dtype. If not, it is reduced by an all-to-all and an all-gather."""
        return dtype in REDUCIBLE

    @property
    def control_device(self) -> torch.device:
        """Device of the small tensors by which ranks agree on sizes, flags and the like."""
        return torch.device("cpu")

    def _dispatch(self, collective: Collective) -> Work[Any]:
        """Start a collective among the ranks of this communicator, without regard to its group."""
        match collective:
            case AllReduce(tensor, op):
                return self._start_all_reduce(tensor, op)
            case AllGather(tensor, same_size, _, sizes):
                return self._start_all_gather(tensor, same_size, sizes)
            case AllToAll(chunks, same_size, _, sizes):
                return self._start_all_to_all(chunks, same_size, sizes)
            case Broadcast(tensor, root):
                return self._start_broadcast(tensor, root)

    def _start_all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> Work[torch.Tensor]:
        if tensor.dtype == torch.bool or tensor.is_complex():
            raise ValueError(f"all_reduce takes integers and real floats, not {tensor.dtype}: convert it first")
        if tensor.dtype == torch.uint64 and op != "sum":
            raise ValueError(f"the {op} of uint64 is not defined: convert it first")
        if op == "mean" and not tensor.is_floating_point():
            raise ValueError(f"the mean of {tensor.dtype} is not defined: use op='sum', or a floating dtype")
        if self.world_size == 1 or tensor.numel() == 0:
            return Work.completed(tensor)
        shape = tensor.shape
        flat = tensor.contiguous().view(-1)
        if not self._reduces_natively(flat.dtype):
            return self._all_reduce_by_exchange(flat, op).then(lambda result: result.view(shape))
        if op != "mean":
            return self._all_reduce(flat, op).then(lambda result: result.view(shape))
        if flat.itemsize < 4:
            # In half precision the sum may overflow where the mean does not. For a power of two the division is exact.
            return self._all_reduce(flat.div_(self.world_size), "sum").then(lambda result: result.view(shape))
        return self._all_reduce(flat, "sum").then(lambda result: result.div_(self.world_size).view(shape))

    def _all_reduce_by_exchange(self, flat: torch.Tensor, op: ReduceOp) -> Work[torch.Tensor]:
        """All-to-all, a local reduction in a wider dtype, all-gather: the bytes of a ring, and one rounding."""
        chunk = math.ceil(flat.numel() / self.world_size)
        padded = flat.new_zeros(chunk * self.world_size)
        padded[: flat.numel()] = flat
        sizes = [chunk] * self.world_size

        def gather_reduced(received: torch.Tensor) -> torch.Tensor:
            reduced = reduce_rows(received.view(self.world_size, chunk), op)
            return self._gather(reduced, sizes).wait()[: flat.numel()]

        return self._exchange(padded, sizes, sizes).then(gather_reduced)

    def _start_all_gather(
        self, tensor: torch.Tensor, same_size: bool, sizes: Sequence[int] | None
    ) -> Work[list[torch.Tensor]]:
        num_rows, row_shape = _rows(tensor)
        counts = [num_rows] * self.world_size if sizes is None else list(sizes)
        self._check_sizes(counts, num_rows)
        if self.world_size == 1:
            return Work.completed([tensor])
        flat = tensor.contiguous().view(-1)
        width = math.prod(row_shape)

        def split(result: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
            parts = result.split([count * width for count in counts])
            if tensor.dim() == 0:
                return [part.view(()) for part in parts]
            return [part.view(count, *row_shape) for part, count in zip(parts, counts, strict=True)]

        def gather(counts: Sequence[int]) -> Work[list[torch.Tensor]]:
            if sum(counts) * width == 0:
                return Work.completed(split(flat.new_empty(0), counts))
            return self._gather(flat, [count * width for count in counts]).then(lambda result: split(result, counts))

        if same_size or tensor.dim() == 0 or sizes is not None:
            return gather(counts)
        all_counts = self._all_gather(self._control_tensor([num_rows]), [1] * self.world_size)
        return all_counts.then(lambda counts: gather(counts.tolist()).wait())

    def _start_all_to_all(
        self, chunks: list[torch.Tensor], same_size: bool, sizes: Sequence[int] | None
    ) -> Work[list[torch.Tensor]]:
        if len(chunks) != self.world_size:
            raise ValueError(f"all_to_all needs one chunk for each of {self.world_size} ranks; got {len(chunks)}")
        if self.world_size == 1:
            return Work.completed(list(chunks))
        _, row_shape = _rows(chunks[0])
        width = math.prod(row_shape)
        send = [_rows(chunk)[0] for chunk in chunks]
        flat = torch.cat([chunk.reshape(-1) for chunk in chunks])

        def exchange(receive: Sequence[int]) -> Work[list[torch.Tensor]]:
            def split(result: torch.Tensor) -> list[torch.Tensor]:
                parts = result.split([count * width for count in receive])
                return [part.view(count, *row_shape) for part, count in zip(parts, receive, strict=True)]

            return self._exchange(flat, [n * width for n in send], [n * width for n in receive]).then(split)

        if same_size or sizes is not None:
            receive = send if sizes is None else list(sizes)
            self._check_sizes(receive, send[self.rank])
            return exchange(receive)
        ones = [1] * self.world_size
        counts = self._all_to_all(self._control_tensor(send), ones, ones)
        return counts.then(lambda receive: exchange(receive.tolist()).wait())

    def _start_broadcast(self, tensor: torch.Tensor, root: int) -> Work[torch.Tensor]:
        if not 0 <= root < self.world_size:
            raise ValueError(f"root must be a rank, 0 to {self.world_size - 1}; got {root}")
        if self.world_size == 1 or tensor.numel() == 0:
            return Work.completed(tensor)
        work = self._broadcast(carrier(tensor), root)
        return work.then(lambda result: result.view(tensor.dtype).view(tensor.shape))

    def _gather(self, flat: torch.Tensor, sizes: Sequence[int]) -> Work[torch.Tensor]:
        """``_all_gather`` for any dtype."""
        carried = carrier(flat)
        width = flat.itemsize // carried.itemsize
        return self._all_gather(carried, [size * width for size in sizes]).then(lambda result: result.view(flat.dtype))

    def _exchange(self, flat: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> Work[torch.Tensor]:
        """``_all_to_all`` for any dtype."""
        carried = carrier(flat)
        width = flat.itemsize // carried.itemsize
        work = self._all_to_all(carried, [size * width for size in send], [size * width for size in receive])
        return work.then(lambda result: result.view(flat.dtype))

    def _check_sizes(self, sizes: Sequence[int], own: int) -> None:
        if len(sizes) != self.world_size or sizes[self.rank] != own:
            raise ValueError(
                f"sizes={list(sizes)} do not fit rank {self.rank} of {self.world_size}, whose size is {own}"
            )

    def _control_tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.control_device)


def _rows(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """Return the length along dimension 0 and the shape of one row; a 0-d tensor is one row of one element."""
    return (tensor.shape[0], tuple(tensor.shape[1:])) if tensor.dim() else (1, ())
