"""The MPI engine, on top of mpi4py.

MPI makes progress only inside its own calls, so non-blocking collectives would stall while backward computes. Instead,
each channel has a thread that runs blocking collectives in the order in which they were started. mpi4py releases the
GIL meanwhile. If MPI does not support calls from several threads, all channels share one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from disttrain.comm.base import Communicator, EngineOp
from disttrain.comm.launch.environment import Environment
from disttrain.comm.work import Work
from disttrain.errors import UserError

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

# Dtypes that MPI can reduce. It has no half-precision types.
_REDUCIBLE = {torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


class MPICommunicator(Communicator):
    """Collectives on a duplicate of ``MPI.COMM_WORLD``. CUDA tensors are staged through host memory."""

    engine = "mpi"

    def __init__(self, environment: Environment, device: torch.device) -> None:
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise UserError(
                "MPI was initialized without thread support: leave mpi4py.rc.thread_level at its default, or call "
                "MPI_Init_thread with MPI_THREAD_SERIALIZED or higher before disttrain.init"
            )
        self._mpi = MPI
        self.shares_order = MPI.Query_thread() < MPI.THREAD_MULTIPLE
        self._mpi_comm: Comm = MPI.COMM_WORLD.Dup()
        self._ops = {"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}
        self.rank, self.world_size = self._mpi_comm.Get_rank(), self._mpi_comm.Get_size()
        if environment.world_size not in (1, self.world_size):
            raise UserError(
                f"the launcher started {environment.world_size} ranks, but MPI sees {self.world_size}: mpirun and the "
                "MPI library that was loaded belong to different installations; use the mpirun of that library"
            )
        host = self._mpi_comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = host.Get_rank(), host.Get_size()
        host.Free()
        self.device = device
        self._thread = _new_thread()
        self._threads = [self._thread]  # shared with channels, which append theirs

    def _reduces_natively(self, dtype: torch.dtype) -> bool:
        return dtype in _REDUCIBLE

    def _submit(self, call: Callable[[torch.Tensor], torch.Tensor], flat: torch.Tensor) -> Work[torch.Tensor]:
        device = flat.device
        future = self._thread.submit(call, flat.cpu())
        if device.type == "cpu":
            return Work(future.result)
        return Work(lambda: future.result().to(device))

    def _all_reduce(self, flat: torch.Tensor, op: EngineOp) -> Work[torch.Tensor]:
        def call(buffer: torch.Tensor) -> torch.Tensor:
            self._mpi_comm.Allreduce(self._mpi.IN_PLACE, buffer.numpy(), op=self._ops[op])
            return buffer

        return self._submit(call, flat)

    def _all_gather(self, flat: torch.Tensor, sizes: Sequence[int]) -> Work[torch.Tensor]:
        def call(buffer: torch.Tensor) -> torch.Tensor:
            result = buffer.new_empty(sum(sizes))
            nbytes = [size * buffer.itemsize for size in sizes]
            self._mpi_comm.Allgatherv(_bytes(buffer), [_bytes(result), nbytes])
            return result

        return self._submit(call, flat)

    def _all_to_all(
        self, flat: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]
    ) -> Work[torch.Tensor]:
        def call(buffer: torch.Tensor) -> torch.Tensor:
            result = buffer.new_empty(sum(receive_sizes))
            sent = [size * buffer.itemsize for size in send_sizes]
            received = [size * buffer.itemsize for size in receive_sizes]
            self._mpi_comm.Alltoallv([_bytes(buffer), sent], [_bytes(result), received])
            return result

        return self._submit(call, flat)

    def _broadcast(self, flat: torch.Tensor, root: int) -> Work[torch.Tensor]:
        def call(buffer: torch.Tensor) -> torch.Tensor:
            self._mpi_comm.Bcast(_bytes(buffer), root=root)
            return buffer

        return self._submit(call, flat)

    def _enter_group(self, groups: Sequence[Sequence[int]], own: int) -> None:
        # On this channel's thread, which also runs the group's collectives: all its MPI calls keep one order.
        self._mpi_comm = self._thread.submit(self._mpi_comm.Split, own, self.rank).result()

    def _enter_channel(self, is_small: bool) -> None:
        self._mpi_comm = self._thread.submit(self._mpi_comm.Dup).result()
        if not self.shares_order:
            self._thread = _new_thread()
            self._threads.append(self._thread)

    def _close(self) -> None:
        for thread in self._threads:
            thread.shutdown(wait=True)


def _new_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="disttrain-mpi")


def _bytes(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """View the tensor's memory as bytes, for collectives that do not reduce."""
    return tensor.view(torch.uint8).numpy()
