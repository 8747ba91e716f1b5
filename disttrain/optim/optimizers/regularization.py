"""L1, and weight decay that is decoupled from the gradient, for any torch optimizer: a hook before its step."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from disttrain.errors import UserError


class Regularization:
    """Adds ``l1 sign(w)`` to the gradients and shrinks weights by ``1 - lr weight_decay``, before each step.

    ``group["l1"]`` and ``group["decoupled_decay"]`` say how much; a group without them is left alone. Decay is that of
    Loshchilov and Hutter (2019), as in torch's AdamW: L2 adds to the gradient, this acts on the weights themselves.

    Example::

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Regularization(optimizer, l1=1e-5, decoupled_decay=1e-4)

    Args:
        optimizer: plain, to be wrapped in a DistributedOptimizer afterwards, if at all.
        l1: of groups that do not say.
        decoupled_decay: of groups that do not say.
    """

    acts_by_parameter = True
    """Each parameter that has a gradient is treated for itself, so steps may be taken bucket by bucket."""

    def __init__(self, optimizer: Optimizer, l1: float = 0.0, decoupled_decay: float = 0.0) -> None:
        for group in optimizer.param_groups:
            group.setdefault("l1", l1)
            group.setdefault("decoupled_decay", decoupled_decay)
        optimizer.register_step_pre_hook(self)

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], kwargs.get("closure"))):
            raise UserError("l1 and decoupled decay come before the step, so the step cannot take a closure")
        for group in optimizer.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            if l1 := group.get("l1"):
                torch._foreach_add_([p.grad for p in parameters], torch._foreach_sign(parameters), alpha=l1)
            if decay := group.get("decoupled_decay"):
                torch._foreach_mul_(parameters, 1 - float(group["lr"]) * decay)
