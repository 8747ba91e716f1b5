"""How deep in a model each parameter lies, from the order of its modules: any model's layers, from input to head.

Modules are visited in the order in which they were made. What counts as one layer:

- each child of a list in which some class comes more than once, with all that it holds: the blocks of a transformer or
  of a residual network, the modules of a plain sequence;
- beside such a list, each module that holds none, with all that it holds: embeddings, a head;
- in a model without such lists, each module that holds parameters itself.

A module of biases and scales alone, such as a norm, belongs to the layer before it. A tied parameter lies where it
comes first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn


def depths(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter by its name, from 0 at the input."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    depth: dict[str, int] = {}
    last = -1
    for parameters in _layers(model):
        new = [names[parameter] for parameter in parameters if names[parameter] not in depth]
        if not new:
            continue
        is_norm = all(parameter.dim() <= 1 for parameter in parameters)
        if last < 0 or not is_norm:
            last += 1
        depth.update(dict.fromkeys(new, last))
    return depth


def _layers(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    if own := list(module.parameters(recurse=False)):
        yield own
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    has_list = [any(_is_list(inner) for inner in child.modules()) for child in children]
    for child, holds_list in zip(children, has_list, strict=True):
        if _is_list(module) or (any(has_list) and not holds_list):
            yield list(child.parameters())
        else:
            yield from _layers(child)


def _is_list(module: nn.Module) -> bool:
    """Whether it is a list, a sequence or a mapping of modules in which a class with parameters comes twice."""
    if not isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        return False
    counts = Counter(type(child) for child in module.children() if any(True for _ in child.parameters()))
    return any(count > 1 for count in counts.values())
