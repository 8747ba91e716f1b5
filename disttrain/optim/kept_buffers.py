"""A model's buffers as the last step left them, so that a skipped step leaves no trace in BatchNorm statistics."""

from __future__ import annotations

import torch


class KeptBuffers:
    """Copies of a model's buffers. A forward pass writes into them before anyone knows whether its step is sound.

    What no step has changed is not copied any more, such as masks: it is kept again once something changes it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._copies: dict[str, torch.Tensor] = {}
        self._versions: dict[str, tuple[int, int]] = {}
        self._is_first = True
        self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        """Note what the buffers are now."""
        versions = {}
        sources, targets = [], []
        for name, buffer in self._model.named_buffers():
            versions[name] = (id(buffer), buffer._version)
            if self._versions.get(name) == versions[name]:
                if not self._is_first:
                    continue
                self._copies.pop(name, None)  # as it was before the first step: seems to be a constant
                continue
            copy = self._copies.get(name)
            if copy is None or copy.shape != buffer.shape or copy.dtype != buffer.dtype or copy.device != buffer.device:
                self._copies[name] = buffer.detach().clone()
            else:
                sources.append(buffer)
                targets.append(copy)
        if sources:
            torch._foreach_copy_(targets, sources)
        self._is_first = self._is_first and not self._versions
        self._versions = versions

    @torch.no_grad()
    def restore(self, *, only_unsound: bool = False) -> None:
        """Give the buffers the values that were kept; ``only_unsound``: those that hold an inf or NaN."""
        for name, buffer in self._model.named_buffers():
            copy = self._copies.get(name)
            if copy is None or self._versions.get(name) == (id(buffer), buffer._version) or copy.shape != buffer.shape:
                continue
            if only_unsound and (not buffer.is_floating_point() or bool(buffer.isfinite().all())):
                continue
            buffer.copy_(copy)
            self._versions[name] = (id(buffer), buffer._version)
