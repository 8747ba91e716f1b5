"""The depth of each parameter in any model, from the order of its modules.

Modules are visited in the order in which they were created. These are layers:

- each child of a module list in which some class occurs more than once, with everything inside it: the blocks of a
  transformer or of a residual network, the modules of a plain sequence;
- in a model with such a list, each module beside it that contains none, with everything inside it: embeddings, a head;
- in a model without such a list, each module that has parameters of its own.

A module of only biases and scales, such as a norm, belongs to the layer before it. A tied parameter belongs to the
layer where it occurs first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Return the index of each parameter's layer by the parameter's name, counted from 0 at the input."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    depths: dict[str, int] = {}
    last = -1
    for parameters in _layers(model):
        new = [names[parameter] for parameter in parameters if names[parameter] not in depths]
        if not new:
            continue
        is_norm = all(parameter.dim() <= 1 for parameter in parameters)
        if last < 0 or not is_norm:
            last += 1
        depths.update(dict.fromkeys(new, last))
    return depths


def _layers(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    if own := list(module.parameters(recurse=False)):
        yield own
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    has_list = [any(_is_layer_list(inner) for inner in child.modules()) for child in children]
    for child, child_has_list in zip(children, has_list, strict=True):
        if _is_layer_list(module) or (any(has_list) and not child_has_list):
            yield list(child.parameters())
        else:
            yield from _layers(child)


def _is_layer_list(module: nn.Module) -> bool:
    """Whether it is a container in which a class with parameters occurs more than once."""
    if not isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        return False
    counts = Counter(type(child) for child in module.children() if any(True for _ in child.parameters()))
    return any(count > 1 for count in counts.values())
