"""Horovod, as an engine only: its collectives are used, its hooks, compression and optimizer are not."""

from __future__ import annotations

import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from disttrain.comm.base import Communicator, EngineOp
from disttrain.comm.launch.environment import Environment
from disttrain.comm.launch.horovod_elastic import can_restart_process
from disttrain.comm.work import Work
from disttrain.errors import UserError

# The reducer hands over whole buckets: fusing them again would only copy them once more. Over MPI it still pays, as one
# large all-reduce of Open MPI's takes less time than several of its parts.
_FUSION_OVER_GLOO = "0"
# How often to look whether a collective is done. ``hvd.synchronize`` alone spins, which takes the processor from
# Horovod's own thread and from backward.
_POLL_SECONDS = 0.0002
_DYNAMIC = "HOROVOD_DYNAMIC_PROCESS_SETS"
# What Horovod's torch all-reduce takes. The base class sums other dtypes by exchange.
_REDUCIBLE = {torch.float16, torch.float32, torch.float64, torch.int32, torch.int64}


class HorovodCommunicator(Communicator):
    """Collectives of ``horovod.torch``. Its settings can be changed by its own environment variables."""

    engine = "horovod"

    def __init__(self, environment: Environment, device: torch.device) -> None:
        import horovod.torch as hvd

        if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ:
            os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", _FUSION_OVER_GLOO)
            _check_host_name()
        hvd.init()
        self._hvd = hvd
        self._ops = {"sum": hvd.Sum, "min": hvd.Min, "max": hvd.Max}
        self.rank, self.world_size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        if environment.world_size not in (1, self.world_size):
            raise UserError(
                f"the launcher started {environment.world_size} ranks but Horovod sees {self.world_size}: start with "
                "horovodrun, or with the mpirun of the MPI that Horovod was built with"
            )
        self.device = device
        self._set = hvd.global_process_set
        self._prefix = ""
        self._sets: dict[tuple[int, ...], Any] = {}  # by their ranks: Horovod refuses to make one twice
        self._free_names: defaultdict[str, list[str]] = defaultdict(list)
        self._num_names: defaultdict[str, int] = defaultdict(int)

    def _reduces_natively(self, dtype: torch.dtype) -> bool:
        return dtype in _REDUCIBLE

    def _submit(
        self, kind: str, call: Callable[[str], Any], finish: Callable[[Any], torch.Tensor]
    ) -> Work[torch.Tensor]:
        """Start under a name that no collective under way has.

        Horovod matches ranks by name and caches what was negotiated under it, so names are used again as soon as they
        are free. They are taken and given back in program order, which is alike on all ranks.
        """
        free = self._free_names[kind]
        if free:
            name = free.pop()
        else:
            name = f"disttrain.{self._prefix}{kind}.{self._num_names[kind]}"
            self._num_names[kind] += 1
        handle = call(name)

        def wait() -> torch.Tensor:
            while not self._hvd.poll(handle):
                time.sleep(_POLL_SECONDS)
            result = self._hvd.synchronize(handle)
            free.append(name)
            return finish(result)

        return Work(wait)

    def _all_reduce(self, flat: torch.Tensor, op: EngineOp) -> Work[torch.Tensor]:
        return self._submit(
            f"{op}.{flat.dtype}.{flat.numel()}",
            lambda name: self._hvd.allreduce_async_(flat, name=name, op=self._ops[op], process_set=self._set),
            lambda result: flat,
        )

    def _all_gather(self, flat: torch.Tensor, sizes: Sequence[int]) -> Work[torch.Tensor]:
        return self._submit(
            f"all_gather.{flat.dtype}",
            lambda name: self._hvd.allgather_async(flat, name=name, process_set=self._set),
            lambda result: result,
        )

    def _all_to_all(
        self, flat: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]
    ) -> Work[torch.Tensor]:
        splits = torch.tensor(send_sizes, dtype=torch.int32)
        return self._submit(
            f"all_to_all.{flat.dtype}",
            lambda name: self._hvd.alltoall_async(flat, splits=splits, name=name, process_set=self._set),
            lambda result: result[0],
        )

    def _broadcast(self, flat: torch.Tensor, root: int) -> Work[torch.Tensor]:
        world_root = self._set.ranks[root]  # Horovod counts roots in the world, also those of a process set
        return self._submit(
            f"broadcast.{flat.dtype}.{flat.numel()}.{root}",
            lambda name: self._hvd.broadcast_async_(flat, world_root, name=name, process_set=self._set),
            lambda result: flat,
        )

    def on_hosts_changed(self, call: Callable[[], None]) -> None:
        if not can_restart_process():
            return
        from horovod.common.elastic import notification_manager

        class Listener:
            def on_hosts_updated(self, timestamp: int, update: int) -> None:
                call()

        notification_manager.init()
        notification_manager.register_listener(Listener())

    def _enter_group(self, parts: Sequence[Sequence[int]], own: int) -> None:
        if os.environ.get(_DYNAMIC) != "1":
            raise UserError(
                f"Horovod makes groups of ranks only if it is started with {_DYNAMIC}=1: export it on every host "
                "(each of its cycles then takes two small rounds more)"
            )
        for part in map(tuple, parts):  # all ranks add all, in one order
            if part not in self._sets:
                self._sets[part] = self._hvd.add_process_set(list(part))
        self._set = self._sets[tuple(parts[own])]
        self._free_names, self._num_names = defaultdict(list), defaultdict(int)

    def _enter_channel(self, is_small: bool) -> None:
        self._prefix = f"channel{self._num_channels}."  # Horovod matches ranks by name, in whatever order they come
        self._free_names, self._num_names = defaultdict(list), defaultdict(int)

    def _close(self) -> None:
        self._hvd.shutdown()


def _check_host_name() -> None:
    # gloo, as Horovod has it, asks for this address whatever interface it is to use, and reads the answer unseen.
    name = socket.gethostname()
    try:
        socket.gethostbyname(name)
    except OSError:
        raise UserError(
            f"this host's own name, {name!r}, has no address, without which Horovod over gloo crashes: add the line "
            f"'127.0.1.1 {name}' to /etc/hosts, or start with horovodrun --mpi"
        ) from None
