"""Hooks on parameters: before a gradient is accumulated, after, and after the user's own hooks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from disttrain.reduction.buckets.bucket import Slot

_handles_by_parameter: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Hooks:
    """The hooks of one reducer, on any number of parameters.

    A parameter calls only the reducer that was added last, since a model may be given to a new optimizer.

    Args:
        before: called with the slot whose gradient is about to be accumulated.
        after: called with the slot when ``parameter.grad`` holds the gradient.
        last: called when the user's hooks have run too.
    """

    def __init__(self, before: Callable[[Slot], None], after: Callable[[Slot], None], last: Callable[[], None]) -> None:
        self._before, self._after, self._last = before, after, last
        self._handles: list[RemovableHandle] = []
        self._nodes: list[Any] = []  # of the graph; kept alive, as they hold the hooks

    def add(self, slots: Iterable[Slot]) -> None:
        """Add hooks to the slots' parameters. They replace those of another reducer."""
        for slot in slots:
            with torch.enable_grad():
                node: Any = torch.autograd.graph.get_gradient_edge(slot.parameter).node
            self._nodes.append(node)
            for handle in _handles_by_parameter.get(slot.parameter, []):
                handle.remove()
            _handles_by_parameter[slot.parameter] = handles = [
                node.register_prehook(functools.partial(_call, self._before, slot)),
                slot.parameter.register_post_accumulate_grad_hook(functools.partial(_call, self._after, slot)),
                node.register_hook(functools.partial(_call, self._last)),
            ]
            self._handles += handles

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()


def _call(*arguments: Any) -> None:
    """Call the first argument, with the slot if that is the second, and without the arguments that autograd adds."""
    function, *others = arguments
    function(*(argument for argument in others[:1] if isinstance(argument, Slot)))


def has_user_hooks(parameter: torch.nn.Parameter) -> bool:
    """Whether the user has post-accumulate hooks on the parameter besides the reducer's."""
    hooks: Any = parameter._post_accumulate_grad_hooks
    return len(hooks) > 1
