"""A model's buffers as the last step left them, so that a skipped step leaves no trace in BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.modules.batchnorm import _NormBase


class KeptBuffers:
    """Copies of a model's buffers. A forward pass writes into them before anyone knows whether its step is sound.

    Statistics of norm layers are copied at each step, since they change at each and without a new version. Others are
    copied when their version has changed; those that the first step leaves alone, such as masks, are not kept at all
    until something changes them.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._copies: dict[str, torch.Tensor] = {}
        self._versions: dict[str, tuple[int, int]] = {}
        self._num_kept = 0
        self.keep()

    def _buffers(self) -> Iterator[tuple[str, torch.Tensor, bool]]:
        """(name, buffer, whether it is known to be as it was when it was last kept)."""
        for prefix, module in self._model.named_modules():
            is_statistics = isinstance(module, _NormBase)
            for name, buffer in module.named_buffers(prefix, recurse=False):
                is_same = self._versions.get(name) == (id(buffer), buffer._version)
                yield name, buffer, is_same and not is_statistics

    @torch.no_grad()
    def keep(self) -> None:
        """Note what the buffers are now."""
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
    def restore(self, is_all: bool) -> None:
        """Give the buffers the values that were kept; without ``is_all`` only those that hold an inf or NaN."""
        for name, buffer, is_same in self._buffers():
            copy = self._copies.get(name)
            if is_same or copy is None or copy.shape != buffer.shape:
                continue
            if is_all or (buffer.is_floating_point() and not bool(buffer.isfinite().all())):
                buffer.copy_(copy)
                self._versions[name] = (id(buffer), buffer._version)
