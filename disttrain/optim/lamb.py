"""LAMB: Adam's direction, with steps whose length is that of the weights, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from disttrain.optim.layerwise import Layerwise, check_between, norms, quotient


class LAMB(Layerwise):
    r"""Layer-wise adaptive moments (You et al. 2020, arXiv:1904.00962v5, algorithm 2).

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        r &= \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} \\
        w &\leftarrow w - \gamma \, \frac{\phi(\|w\|)}{\|r + \lambda w\|} \, (r + \lambda w)

    with the learning rate :math:`\gamma` (``lr``) and weight decay :math:`\lambda`. :math:`\phi` is the identity, or
    cuts the norm to ``norm_bounds``. ``bias_correction=False`` leaves out both divisions by :math:`1 - \beta^t`, as the
    paper's appendix does ("adam-correction"), with a warm-up of the rate in their place. The gradient is not clipped
    by its global norm here: ``DistributedOptimizer(clip_norm=...)`` does that.

    Parameters of one dimension or none (biases, norms) have neither a trust ratio nor decay: they take steps of Adam.
    Keys of a group change that: see ``Layerwise``. Where a norm is 0 the trust ratio is 1.

    Example::

        optimizer = LAMB(model.parameters(), lr=2e-3, weight_decay=0.01)

    Args:
        params: parameters, or groups of them, of any real floating-point dtype and device; gradients must be dense.
        lr: the learning rate: the length of a step as a part of the weights' norm.
        betas: of both moments, from 0 to below 1.
        eps: added to the root of the second moment.
        weight_decay: as in the formula.
        bias_correction: see above.
        norm_bounds: the least and the largest norm of weights that counts; None: any.
        adapt: whether parameters have a trust ratio; None: those of two dimensions or more.
        decay_1d: whether weight decay also holds for parameters of one dimension or none.

    Attributes:
        trust_ratios: the last :math:`\phi(\|w\|) / \|r + \lambda w\|` of each parameter that has one, a 0-d tensor.

    Raises:
        ValueError: an argument is out of bounds.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        norm_bounds: tuple[float, float] | None = None,
        adapt: bool | None = None,
        decay_1d: bool = False,
    ) -> None:
        check_between("lr", lr, 0)
        for index, beta in enumerate(betas):
            check_between(f"betas[{index}]", beta, 0, 1)
        check_between("eps", eps, 1e-30)
        check_between("weight_decay", weight_decay, 0)
        if norm_bounds is not None and not 0 <= norm_bounds[0] < norm_bounds[1]:
            raise ValueError(f"norm_bounds={norm_bounds} must rise from 0 or more")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "norm_bounds": norm_bounds,
                "adapt": adapt,
                "decay_1d": decay_1d,
            },
        )

    def _update(
        self, group: Mapping[str, Any], parameters: list[torch.Tensor], weight_decay: float, adapts: bool
    ) -> None:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        beta1, beta2 = group["betas"]
        states = [self._state_of(parameter) for parameter in parameters]
        means, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        torch._foreach_add_([state["step"] for state in states], 1)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)

        roots = torch._foreach_sqrt(squares)
        if group["bias_correction"]:
            steps = [state["step"].item() for state in states]
            torch._foreach_div_(roots, [math.sqrt(1 - beta2**step) for step in steps])
            torch._foreach_add_(roots, group["eps"])
            updates = torch._foreach_div(means, [1 - beta1**step for step in steps])
            torch._foreach_div_(updates, roots)
        else:
            torch._foreach_add_(roots, group["eps"])
            updates = torch._foreach_div(means, roots)
        if weight_decay:
            torch._foreach_add_(updates, parameters, alpha=weight_decay)
        if adapts:
            weights = norms(parameters)
            if group["norm_bounds"] is not None:
                weights = weights.clamp(*group["norm_bounds"])
            torch._foreach_mul_(updates, self._note(parameters, quotient(weights, norms(updates))))
        torch._foreach_add_(parameters, updates, alpha=-float(group["lr"]))

    def _state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state
