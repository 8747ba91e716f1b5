"""Copies of a run's tensors in main memory, from which a checkpoint is written while training continues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

Files: TypeAlias = dict[str, dict[str, torch.Tensor]]
"""Tensors by name, by the name of the file that they are written to."""


class StagingBuffers:
    """Memory for the tensors of one checkpoint, reused by later ones: allocating new pages costs more than copying.

    CUDA tensors are copied to pinned memory on the current stream, and training may continue. ``wait`` blocks until the
    copies are complete.
    """

    def __init__(self) -> None:
        self._buffers: Files = {}
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def stage(self, files: Mapping[str, Mapping[str, torch.Tensor]]) -> Files:
        """Return contiguous copies of the tensors. They may be read after ``wait``, until the next ``stage``."""
        before, self._buffers, self._copied = self._buffers, {}, None
        device: torch.device | None = None
        for file, tensors in files.items():
            known, copies = before.get(file, {}), {}
            for name, tensor in tensors.items():
                copy = known.get(name)
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                copies[name] = copy.copy_(tensor, non_blocking=True)
                if tensor.is_cuda:
                    device = tensor.device
            self._buffers[file] = copies
        if device is not None:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))
        return self._buffers

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
