"""The torch.distributed engine: nccl if every local rank has its own GPU, otherwise gloo."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from disttrain.comm.base import Communicator, EngineOp
from disttrain.comm.launch.attempt_store import attempt_store
from disttrain.comm.launch.environment import Environment
from disttrain.comm.work import Work
from disttrain.errors import UserError

# Renamed in torch 2.13.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_MAX_TIMEOUT_SECONDS = 365.0 * 24 * 3600  # torch.distributed counts milliseconds, which would overflow

_OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


class TorchCommunicator(Communicator):
    """Collectives on torch.distributed's default process group, which is initialized here if the user has not done so.

    Args:
        environment: what the launcher says about ranks.
        device: where this rank's model lives.
        timeout: seconds to wait for the other ranks to join.
        patience: seconds after which a collective times out.
    """

    engine = "torch"

    def __init__(self, environment: Environment, device: torch.device, timeout: float, patience: float) -> None:
        self._patience = timedelta(seconds=min(patience, _MAX_TIMEOUT_SECONDS))
        self.rank, self.world_size = environment.rank, environment.world_size
        self.local_rank, self.local_size = environment.local_rank, environment.local_size
        self.device = device
        own_gpu = device.type == "cuda" and torch.cuda.device_count() >= self.local_size
        self.backend = "nccl" if own_gpu and dist.is_nccl_available() else "gloo"
        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            self._join_group(environment, timeout)
        else:
            self.backend = dist.get_backend()
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._lanes: list[dist.ProcessGroup | None] = [None]  # take all-reduces in turn; None is the default group
        self._num_started = 0
        self._ranks: Sequence[int] = range(self.world_size)
        if self.backend == "gloo" and self.world_size > 1:
            _let_event_loops_wait()

    @classmethod
    def join(
        cls, environment: Environment, device: torch.device, *, timeout: float, patience: float
    ) -> TorchCommunicator:
        return cls(environment, device, timeout, patience)

    def _join_group(self, environment: Environment, timeout: float) -> None:
        host, port = environment.rendezvous()
        if environment.num_hosts == 1:
            # Workers of a single host need not listen on its network.
            loopback = _loopback_interface()
            if loopback is not None:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        limit = timedelta(seconds=timeout)
        try:
            uses_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            is_master = self.rank == 0 and not uses_agent_store
            store: Store = TCPStore(host, port, self.world_size, is_master=is_master, timeout=limit)
            if uses_agent_store:
                store = attempt_store(store, self.rank, self.world_size, timeout)
            dist.init_process_group(
                self.backend, store=store, rank=self.rank, world_size=self.world_size, timeout=self._patience
            )
        except (dist.DistError, RuntimeError, ValueError, TimeoutError) as error:
            raise _explain(error, host, port, self.rank, self.world_size, timeout) from error

    @property
    def control_device(self) -> torch.device:
        return self.device if self.backend == "nccl" else torch.device("cpu")

    def _all_reduce(self, flat: torch.Tensor, op: EngineOp) -> Work[torch.Tensor]:
        group = self._lanes[self._num_started % len(self._lanes)]
        self._num_started += 1
        return _pending(dist.all_reduce(flat, _OPS[op], group=group, async_op=True), flat)

    def _all_gather(self, flat: torch.Tensor, sizes: Sequence[int]) -> Work[torch.Tensor]:
        largest = max(sizes)
        if min(sizes) == largest:
            result = flat.new_empty(self.world_size * largest)
            return _pending(_all_gather_single(result, flat, group=self._lanes[0], async_op=True), result)
        padded = flat.new_zeros(largest)  # torch.distributed gathers only equal sizes
        padded[: flat.numel()] = flat
        result = flat.new_empty(self.world_size * largest)
        work = _all_gather_single(result, padded, group=self._lanes[0], async_op=True)

        def finish() -> torch.Tensor:
            work.wait()
            return torch.cat([row[:size] for row, size in zip(result.view(-1, largest), sizes, strict=True)])

        return Work(finish)

    def _all_to_all(
        self, flat: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]
    ) -> Work[torch.Tensor]:
        result = flat.new_empty(sum(receive_sizes))
        sizes = list(receive_sizes), list(send_sizes)
        work = dist.all_to_all_single(result, flat, *sizes, group=self._lanes[0], async_op=True)
        return _pending(work, result)

    def _broadcast(self, flat: torch.Tensor, root: int) -> Work[torch.Tensor]:
        return _pending(dist.broadcast(flat, self._ranks[root], group=self._lanes[0], async_op=True), flat)

    def _enter_group(self, groups: Sequence[Sequence[int]], own: int) -> None:
        # Every rank takes part in creating all process groups, not only its own, in the same order.
        lanes = [[dist.new_group(list(ranks), self._patience, self.backend) for ranks in groups] for _ in self._lanes]
        self._ranks, self._num_started = groups[own], 0
        self._lanes = [process_groups[own] for process_groups in lanes]
        _let_event_loops_wait()

    def _enter_channel(self, is_small: bool) -> None:
        if self.backend == "nccl" and not is_small:
            self.shares_order = True  # GPUs that run two NCCL groups in different orders can deadlock
            return
        # gloo runs the collectives of a process group in the order in which they were started, two at a time. A second
        # process group takes every other all-reduce, so the next one proceeds while one waits for its last phase.
        self.backend = "gloo"
        self._lanes = [dist.new_group(backend="gloo", timeout=self._patience) for _ in range(1 if is_small else 2)]
        self._num_started = 0
        _let_event_loops_wait()

    def _close(self) -> None:
        # Destroying the process groups ends gloo's threads only once nothing refers to the groups. A thread that
        # releases a tensor while the interpreter shuts down would abort the process.
        for comm in (self, *self._channels):
            assert isinstance(comm, TorchCommunicator)
            comm._lanes, comm._groups = [], {}
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()


def _let_event_loops_wait() -> None:
    """Keep gloo's event loops from preempting other threads, by SCHED_BATCH. Priorities do not change.

    While another thread holds a connection's lock, the event loop polls the kernel in a busy loop. If workers have more
    threads than cores, it may take the core from the very thread that holds the lock. Each process group has its own
    event loop, so this must be called whenever process groups are created.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # no /proc, or the thread has ended
            if (task / "comm").read_text().startswith("gloo_tcp"):
                os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))


def _pending(work: Any, result: torch.Tensor) -> Work[torch.Tensor]:
    def finish() -> torch.Tensor:
        work.wait()
        return result

    return Work(finish)


def _loopback_interface() -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.family == socket.AF_INET and address.address == "127.0.0.1" for address in addresses):
            return str(name)
    return None


def _explain(error: Exception, host: str, port: int, rank: int, world_size: int, timeout: float) -> UserError:
    text = str(error)
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return UserError(f"port {port} on {host} is in use: set MASTER_PORT to a free port, the same on all ranks")
    if "timed out" in text.lower() or "timeout" in text.lower():
        return UserError(
            f"rank {rank} waited {timeout:g} s at {host}:{port} for {world_size} ranks: start all of them, with the "
            "same MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
        )
    first_line = (text.splitlines() or [repr(error)])[0]
    return UserError(f"rank {rank} could not join the others at {host}:{port}: {first_line}")
