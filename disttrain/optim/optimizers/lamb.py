"""LAMB: Adam's direction, with steps whose length is that of the weights, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from disttrain.optim.optimizers.layerwise import Layerwise, check_between, norms, quotient, uses_lists

_FOREVER = 1e30  # steps after which no bias is left to correct


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
        foreach: whether to go over lists of tensors; None: except on the CPU, where torch's fused Adam does the work.

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
        foreach: bool | None = None,
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
                "foreach": foreach,
            },
        )

    def _update(
        self, group: Mapping[str, Any], parameters: list[torch.Tensor], weight_decay: float, adapts: bool
    ) -> None:
        states = [self._state_of(parameter) for parameter in parameters]
        torch._foreach_add_([state["step"] for state in states], 1)
        lists = uses_lists(group, parameters[0].device) or not all(map(_are_alike, parameters, states))
        updates = (_updates if lists else _fused_updates)(group, parameters, states, weight_decay)
        rate = float(group["lr"])
        if not adapts:
            torch._foreach_add_(parameters, updates, alpha=-rate)
            return
        weights = norms(parameters)
        if group["norm_bounds"] is not None:
            weights = weights.clamp(*group["norm_bounds"])
        ratios = self._note(parameters, quotient(weights, norms(updates)))
        if lists:
            torch._foreach_mul_(updates, ratios)
            torch._foreach_add_(parameters, updates, alpha=-rate)
            return
        for parameter, update, ratio in zip(parameters, updates, ratios, strict=True):
            parameter.add_(update, alpha=-rate * ratio.item())

    def _state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _updates(
    group: Mapping[str, Any], parameters: list[torch.Tensor], states: list[dict[str, Any]], weight_decay: float
) -> list[torch.Tensor]:
    """Adam's direction and the decay: r + lambda w."""
    beta1, beta2 = group["betas"]
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    means, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
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
    return list(updates)


def _fused_updates(
    group: Mapping[str, Any], parameters: list[torch.Tensor], states: list[dict[str, Any]], weight_decay: float
) -> list[torch.Tensor]:
    """The same by torch's fused Adam, which takes a step of length 1 from -lambda w; its sign turned."""
    updates = [parameter * weight_decay if weight_decay else torch.zeros_like(parameter) for parameter in parameters]
    steps = [state["step"] for state in states]
    if not group["bias_correction"]:
        steps = [torch.full_like(step, _FOREVER) for step in steps]
    torch._fused_adam_(
        updates,
        [parameter.grad for parameter in parameters if parameter.grad is not None],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        steps,
        lr=-1.0,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=0.0,
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
    return updates


def _are_alike(parameter: torch.Tensor, state: Mapping[str, Any]) -> bool:
    """Whether memory is laid out alike and without gaps, as the fused loop needs it."""
    grad = parameter.grad
    strides = {
        tensor.stride() for tensor in (parameter, grad, state["exp_avg"], state["exp_avg_sq"]) if tensor is not None
    }
    return len(strides) == 1 and torch.empty_like(parameter).stride() == parameter.stride()
