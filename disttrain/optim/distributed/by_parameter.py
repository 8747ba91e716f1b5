"""Optimizers that treat each parameter by itself, so that they can step on a gradient before others have arrived."""

from __future__ import annotations

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from disttrain.optim.optimizers.lamb import LAMB
from disttrain.optim.optimizers.lars import LARS

_BY_PARAMETER = {
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "ASGD", "Rprop")
} | {LARS, LAMB}


def acts_by_parameter(optimizer: Optimizer) -> bool:
    """Whether stepping on some parameters after others is the same as one step on all.

    It is not if a hook of the optimizer, or a global one, would see several steps instead of one. Of subclasses it is
    not known.
    """
    hooks = [
        *optimizer._optimizer_step_pre_hooks.values(),
        *optimizer._optimizer_step_post_hooks.values(),
        *torch_optimizer._global_optimizer_pre_hooks.values(),
        *torch_optimizer._global_optimizer_post_hooks.values(),
    ]
    return type(optimizer) in _BY_PARAMETER and all(getattr(hook, "acts_by_parameter", False) for hook in hooks)
