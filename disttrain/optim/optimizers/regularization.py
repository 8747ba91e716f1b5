"""L1 regularization and decoupled weight decay for any torch optimizer, as a hook before its step."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from disttrain.errors import UserError


class Regularization:
    """Adds ``l1 * sign(w)`` to gradients and multiplies weights by ``1 - lr * decoupled_decay`` before each step.

    A parameter group sets both by its keys ``"l1"`` and ``"decoupled_decay"``. Decoupled weight decay acts on the
    weights themselves, as in torch's AdamW (Loshchilov and Hutter 2019), where L2 regularization adds to the gradient.

    Example::

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Regularization(optimizer, l1=1e-5, decoupled_decay=1e-4)

    Args:
        optimizer: A plain torch optimizer. Wrap it in a DistributedOptimizer afterwards, if at all.
        l1: Default of groups without the key.
        decoupled_decay: Default of groups without the key.
    """

    acts_by_parameter = True
    """Each parameter is updated independently of all others, so the optimizer may step bucket by bucket."""

    def __init__(self, optimizer: Optimizer, l1: float = 0.0, decoupled_decay: float = 0.0) -> None:
        for group in optimizer.param_groups:
            group.setdefault("l1", l1)
            group.setdefault("decoupled_decay", decoupled_decay)
        optimizer.register_step_pre_hook(self)

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], kwargs.get("closure"))):
            raise UserError(
                "l1 and decoupled weight decay are applied before the step, so step() cannot take a closure"
            )
        for group in optimizer.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            if l1 := group.get("l1"):
                torch._foreach_add_([p.grad for p in parameters], torch._foreach_sign(parameters), alpha=l1)
            if decay := group.get("decoupled_decay"):
                torch._foreach_mul_(parameters, 1 - float(group["lr"]) * decay)
