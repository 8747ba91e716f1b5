"""Which optimizers treat each parameter for itself, so that they may step on some gradients before others are there."""

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
    """Whether steps on some parameters after others are the same as one step on all.

    Not where a user's hook, or torch's hooks for all optimizers, would see several steps in place of one; and not of a
    subclass, which may do anything.
    """
    hooks = [
        *optimizer._optimizer_step_pre_hooks.values(),
        *optimizer._optimizer_step_post_hooks.values(),
        *torch_optimizer._global_optimizer_pre_hooks.values(),
        *torch_optimizer._global_optimizer_post_hooks.values(),
    ]
    return type(optimizer) in _BY_PARAMETER and all(getattr(hook, "acts_by_parameter", False) for hook in hooks)
