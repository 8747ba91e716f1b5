"""Limits on the samples per backward pass of a worker: a given one, or one estimated from the memory of passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import psutil
import torch

from disttrain.comm import Communicator

SHARE = 0.8
"""Share of free memory that a pass may use. Samples differ in size, and allocators lose some memory."""


class MicroBatchLimit:
    """A fixed limit, or none.

    Attributes:
        max_samples: Most samples per pass of any rank; None: no limit.
    """

    def __init__(self, max_samples: int | None) -> None:
        self.max_samples = max_samples

    def measure(self, model: torch.nn.Module, num_samples: int) -> contextlib.AbstractContextManager[None]:
        """Return a context for the forward and backward pass of ``num_samples`` samples, at least 1, of this rank."""
        return contextlib.nullcontext()

    def end_step(self) -> None:
        """End an optimizer step. A collective if its passes were measured."""

    def restart(self) -> None:
        """Measure again, because the batch size has changed."""

    def state_dict(self) -> list[int] | None:
        """Return the state as JSON values, equal on all ranks; None: there is none."""
        return None

    def load_state_dict(self, state: Sequence[int] | None) -> None:
        """Load what ``state_dict`` returned, in a run that may have had another kind of limit."""


class MemoryLimit(MicroBatchLimit):
    """A limit estimated from the memory that passes use. One step is measured after each change of the batch.

    If a pass of n samples uses a + b n bytes of M, the estimate is ``n M / (a + b n)`` samples. That many fit for any
    fixed part a, as long as n samples fit: the estimate is on the safe side, and improves as passes grow. The second
    step is measured, because optimizers create their state in the first step.

    On a GPU the allocator's peak counts. On a CPU the storages that autograd saves for the backward pass count, each
    once, without parameters.

    Args:
        comm: The communicator. The ranks of a host share its memory.
        max_samples: The limit before the first measurement.
        limit_gib: GiB that a pass may use; None: ``SHARE`` of what is free when it starts.

    Attributes:
        max_samples: Most samples per pass of any rank.
        num_steps: Steps since the batch last changed.
    """

    max_samples: int

    def __init__(self, comm: Communicator, max_samples: int, limit_gib: float | None = None) -> None:
        super().__init__(max_samples)
        self._comm, self._limit = comm, None if limit_gib is None else limit_gib * 2**30
        self.num_steps = 0
        self._estimates: list[int] = []

    @property
    def _is_due(self) -> bool:
        return self.num_steps == 1

    def measure(self, model: torch.nn.Module, num_samples: int) -> contextlib.AbstractContextManager[None]:
        return self._measure(model, num_samples) if self._is_due else contextlib.nullcontext()

    @contextlib.contextmanager
    def _measure(self, model: torch.nn.Module, num_samples: int) -> Iterator[None]:
        device = self._comm.device
        limit = SHARE * self._free_memory() if self._limit is None else self._limit
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            yield
            used = torch.cuda.max_memory_allocated(device) - before
        else:
            parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
            saved: dict[int, int] = {}

            def record(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in parameters:
                    saved[storage.data_ptr()] = storage.nbytes()
                return tensor.detach()  # the tensor itself would keep its graph alive

            with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
                yield
            used = sum(saved.values())
        self._estimates.append(max(1, int(num_samples * limit / max(1, used))))

    def _free_memory(self) -> float:
        """Return the bytes of memory on the device that are free for this worker."""
        device = self._comm.device
        if device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return float(torch.cuda.mem_get_info(device)[0] + unused)
        return float(psutil.virtual_memory().available / self._comm.local_size)

    def end_step(self) -> None:
        if self._is_due:
            estimates = [estimate for own in self._comm.all_gather_object(self._estimates) for estimate in own]
            self.max_samples = min(estimates, default=self.max_samples)
            self._estimates = []
        self.num_steps += 1

    def restart(self) -> None:
        self.num_steps = 0

    def state_dict(self) -> list[int]:
        return [self.max_samples, self.num_steps]

    def load_state_dict(self, state: Sequence[int] | None) -> None:
        if state is not None:
            self.max_samples, self.num_steps = state
