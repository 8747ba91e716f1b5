"""Copies of a model's buffers, from which a skipped step is undone in BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.modules.batchnorm import _NormBase


class KeptBuffers:
    """Copies of a model's buffers as of the last step. A forward pass changes buffers before its step may be skipped.

    Statistics of norm layers are copied at each step, since they change at each step without a new version. Others are
    copied when their version has changed. Those that the first step does not change, such as masks, are not kept until
    something changes them.

    Args:
        model: whose buffers to keep.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._copies: dict[str, torch.Tensor] = {}
        self._versions: dict[str, tuple[int, int]] = {}
        self._num_kept = 0
        self.keep()

    def _buffers(self) -> Iterator[tuple[str, torch.Tensor, bool]]:
        """Yield (name, buffer, whether the buffer is known to be unchanged since it was kept)."""
        for prefix, module in self._model.named_modules():
            is_statistics = isinstance(module, _NormBase)
            for name, buffer in module.named_buffers(prefix, recurse=False):
                is_same = self._versions.get(name) == (id(buffer), buffer._version)
                yield name, buffer, is_same and not is_statistics

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the buffers."""
        sources, targets = [], []
        for name, buffer, is_same in self._buffers():
            self._versions[name] = (id(buffer), buffer._version)
            copy = self._copies.get(name)
            if is_same:
                if self._num_kept == 1:
                    self._copies.pop(name, None)
            elif copy is None or copy.shape != buffer.shape or copy.dtype != buffer.dtype:
                self._copies[name] = buffer.detach().clone()
            else:
                sources.append(buffer)
                targets.append(copy)
        if sources:
            torch._foreach_copy_(targets, sources)
        self._num_kept += 1

    @torch.no_grad()
    def restore(self, restores_all: bool) -> None:
        """Restore the buffers; unless ``restores_all``, only those that hold an inf or NaN."""
        for name, buffer, is_same in self._buffers():
            copy = self._copies.get(name)
            if is_same or copy is None or copy.shape != buffer.shape:
                continue
            if restores_all or (buffer.is_floating_point() and not bool(buffer.isfinite().all())):
                buffer.copy_(copy)
                self._versions[name] = (id(buffer), buffer._version)
