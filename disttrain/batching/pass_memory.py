"""How many samples fit a backward pass of one worker, from the memory that passes took."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import psutil
import torch

from disttrain.comm import Communicator

SHARE = 0.8
"""Of what is free: samples differ, and allocators lose some of it."""


class FixedLimit:
    """``max_micro_batch`` as a number, or none: nothing is watched.

    Attributes:
        fitting: samples that a pass of any rank may have; None: any number.
    """

    def __init__(self, fitting: int | None) -> None:
        self.fitting = fitting

    def watch(self, model: torch.nn.Module, num_samples: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def end_step(self) -> None: ...

    def begin(self) -> None: ...

    def state_dict(self) -> list[int] | None:
        return None

    def load_state_dict(self, state: Sequence[int] | None) -> None: ...


class PassMemory:
    """Watches the passes of one step after each change of the batch, and says how many samples a pass may have.

    If a pass of n samples takes a + b n bytes of M, ``n M / (a + b n)`` samples fit whatever the fixed part a is, as
    long as n do. So the answer errs on the safe side, and improves as passes grow. It is the second step that counts:
    in the first one ever, optimizers have yet to make their state.

    On a GPU the allocator's peak counts; on a CPU what autograd keeps for the backward pass, each storage once, without
    parameters.

    Args:
        comm: the ranks; those of one host share its memory.
        fitting: samples that a pass may have before anything has been measured.
        limit_gib: what a pass may take, in GiB; None: ``SHARE`` of what is free when it begins.

    Attributes:
        fitting: samples that a pass of any rank may have.
        num_steps: since the batch last changed.
    """

    def __init__(self, comm: Communicator, fitting: int, limit_gib: float | None = None) -> None:
        self._comm, self._limit = comm, None if limit_gib is None else limit_gib * 2**30
        self.fitting, self.num_steps = fitting, 0
        self._found: list[int] = []

    @property
    def _is_due(self) -> bool:
        return self.num_steps == 1

    def watch(self, model: torch.nn.Module, num_samples: int) -> contextlib.AbstractContextManager[None]:
        """Forward and backward of a pass of so many samples of this rank, 1 or more, go within."""
        return self._watch(model, num_samples) if self._is_due else contextlib.nullcontext()

    @contextlib.contextmanager
    def _watch(self, model: torch.nn.Module, num_samples: int) -> Iterator[None]:
        device = self._comm.device
        limit = SHARE * self._free() if self._limit is None else self._limit
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            yield
            taken = torch.cuda.max_memory_allocated(device) - before
        else:
            parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
            kept: dict[int, int] = {}

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in parameters:
                    kept[storage.data_ptr()] = storage.nbytes()
                return tensor.detach()  # the tensor itself would hold on to the graph that it is part of

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                yield
            taken = sum(kept.values())
        self._found.append(max(1, int(num_samples * limit / max(1, taken))))

    def _free(self) -> float:
        """Bytes of its device's memory that this worker could have now."""
        device = self._comm.device
        if device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return float(torch.cuda.mem_get_info(device)[0] + unused)
        return float(psutil.virtual_memory().available / self._comm.local_size)

    def end_step(self) -> None:
        """All ranks go by the pass that leaves the least room. A collective in the step that was watched."""
        if self._is_due:
            found = [fitting for own in self._comm.all_gather_object(self._found) for fitting in own]
            self.fitting = min(found, default=self.fitting)
            self._found = []
        self.num_steps += 1

    def begin(self) -> None:
        """The batch has changed: the second step from here on is watched."""
        self.num_steps = 0

    def state_dict(self) -> list[int]:
        """What has been found, equal on all ranks, as JSON values."""
        return [self.fitting, self.num_steps]

    def load_state_dict(self, state: Sequence[int] | None) -> None:
        """Take over what ``state_dict`` gave; nothing of a run that did not measure."""
        if state is not None:
            self.fitting, self.num_steps = state
