"""Copies of a run's tensors in main memory, from which a checkpoint is written while the run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

Files: TypeAlias = dict[str, dict[str, torch.Tensor]]
"""Tensors by their names, by the names of the files that they go to."""


class Copies:
    """Memory for the tensors of one checkpoint. It is kept for the next one: new pages cost more than copying.

    Tensors of a GPU are copied to pinned memory, in its stream, so the next step may follow at once; ``wait`` returns
    when they have arrived.
    """

    def __init__(self) -> None:
        self._kept: Files = {}
        self._arrival: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, files: Mapping[str, Mapping[str, torch.Tensor]]) -> Files:
        """Copies of the tensors, contiguous; after ``wait`` they may be read, until the next ``take``."""
        before, self._kept, self._arrival = self._kept, {}, None
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
            self._kept[file] = copies
        if device is not None:
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(device))
        return self._kept

    def wait(self) -> None:
        if self._arrival is not None:
            self._arrival.synchronize()
