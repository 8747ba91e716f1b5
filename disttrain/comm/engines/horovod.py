"""The Horovod engine. Uses Horovod's collectives only, not its hooks, compression or optimizer."""

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

# The reducer passes whole buckets, so fusion over gloo would only copy them once more. Over MPI fusion still pays: with
# Open MPI, one large all-reduce is faster than several smaller ones.
_FUSION_THRESHOLD_FOR_GLOO = "0"
# ``hvd.synchronize`` alone busy-waits, which takes the CPU from Horovod's own thread and from backward: poll first.
_POLL_SECONDS = 0.0002
_DYNAMIC_SETS = "HOROVOD_DYNAMIC_PROCESS_SETS"
# Dtypes that Horovod's all-reduce for torch supports.
_REDUCIBLE = {torch.float16, torch.float32, torch.float64, torch.int32, torch.int64}


class HorovodCommunicator(Communicator):
    """Collectives of ``horovod.torch``, which is configured by its own environment variables."""

    engine = "horovod"

    def __init__(self, environment: Environment, device: torch.device) -> None:
        import horovod.torch as hvd

        if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ:
            os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", _FUSION_THRESHOLD_FOR_GLOO)
            _check_host_name()
        hvd.init()
        self._hvd = hvd
        self._ops = {"sum": hvd.Sum, "min": hvd.Min, "max": hvd.Max}
        self.rank, self.world_size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        if environment.world_size not in (1, self.world_size):
            raise UserError(
                f"the launcher started {environment.world_size} ranks, but Horovod sees {self.world_size}: start them "
                "with horovodrun, or with the mpirun of the MPI that Horovod was built with"
            )
        self.device = device
        self._process_set = hvd.global_process_set
        self._name_prefix = ""
        # By ranks, and shared with groups: Horovod refuses to create the same process set twice.
        self._process_sets: dict[tuple[int, ...], Any] = {}
        self._free_names: defaultdict[str, list[str]] = defaultdict(list)
        self._num_names: defaultdict[str, int] = defaultdict(int)

    def _reduces_natively(self, dtype: torch.dtype) -> bool:
        return dtype in _REDUCIBLE

    def _submit(
        self, kind: str, call: Callable[[str], Any], finish: Callable[[Any], torch.Tensor]
    ) -> Work[torch.Tensor]:
        """Start a collective under a name that no other collective in flight has.

        Horovod matches the ranks' collectives by name, and caches the negotiation for each name, so names are reused
        once they are free. Names are taken and freed in program order, which is the same on all ranks.
        """
        free = self._free_names[kind]
        if free:
            name = free.pop()
        else:
            name = f"disttrain.{self._name_prefix}{kind}.{self._num_names[kind]}"
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
            lambda name: self._hvd.allreduce_async_(flat, name=name, op=self._ops[op], process_set=self._process_set),
            lambda result: flat,
        )

    def _all_gather(self, flat: torch.Tensor, sizes: Sequence[int]) -> Work[torch.Tensor]:
        return self._submit(
            f"all_gather.{flat.dtype}",
            lambda name: self._hvd.allgather_async(flat, name=name, process_set=self._process_set),
            lambda result: result,
        )

    def _all_to_all(
        self, flat: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]
    ) -> Work[torch.Tensor]:
        splits = torch.tensor(send_sizes, dtype=torch.int32)
        return self._submit(
            f"all_to_all.{flat.dtype}",
            lambda name: self._hvd.alltoall_async(flat, splits=splits, name=name, process_set=self._process_set),
            lambda result: result[0],
        )

    def _broadcast(self, flat: torch.Tensor, root: int) -> Work[torch.Tensor]:
        world_root = self._process_set.ranks[root]  # Horovod takes the root's global rank, even in a process set
        return self._submit(
            f"broadcast.{flat.dtype}.{flat.numel()}.{root}",
            lambda name: self._hvd.broadcast_async_(flat, world_root, name=name, process_set=self._process_set),
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

    def _enter_group(self, groups: Sequence[Sequence[int]], own: int) -> None:
        if os.environ.get(_DYNAMIC_SETS) != "1":
            raise UserError(
                f"Horovod can create groups of ranks only if it was started with {_DYNAMIC_SETS}=1: export it on every "
                "host (each cycle of Horovod then takes two more small rounds)"
            )
        for ranks in map(tuple, groups):  # every rank adds all process sets, in the same order
            if ranks not in self._process_sets:
                self._process_sets[ranks] = self._hvd.add_process_set(list(ranks))
        self._process_set = self._process_sets[tuple(groups[own])]
        self._free_names, self._num_names = defaultdict(list), defaultdict(int)

    def _enter_channel(self, is_small: bool) -> None:
        # Horovod matches collectives by name, not by order, so other names are enough to make a channel.
        self._name_prefix = f"channel{self._num_channels}."
        self._free_names, self._num_names = defaultdict(list), defaultdict(int)

    def _close(self) -> None:
        self._hvd.shutdown()


def _check_host_name() -> None:
    # Horovod's gloo looks up this address whichever interface it will use, and does not check whether that failed.
    name = socket.gethostname()
    try:
        socket.gethostbyname(name)
    except OSError:
        raise UserError(
            f"this host's own name, {name!r}, has no address, and Horovod over gloo crashes without one: add the line "
            f"'127.0.1.1 {name}' to /etc/hosts, or start with horovodrun --mpi"
        ) from None
