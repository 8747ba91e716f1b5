"""LAMB: Adam's direction, with steps proportional to the norm of the weights, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from disttrain.optim.optimizers.layerwise import Layerwise, check_between, norms, uses_foreach

_FOREVER = 1e30  # a number of steps after which bias correction is exactly 1


class _State(NamedTuple):
    """The state of several parameters, in their order."""

    steps: list[torch.Tensor]
    means: list[torch.Tensor]
    squares: list[torch.Tensor]


class LAMB(Layerwise):
    r"""Layer-wise adaptive moments (You et al. 2020, arXiv:1904.00962v5, algorithm 2).

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        r &= \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} \\
        w &\leftarrow w - \gamma \, \frac{\phi(\|w\|)}{\|r + \lambda w\|} \, (r + \lambda w)

    with learning rate :math:`\gamma` (``lr``) and weight decay :math:`\lambda`. :math:`\phi` is the identity, or clamps
    the norm to ``norm_bounds``. ``bias_correction=False`` omits both divisions by :math:`1 - \beta^t`: the paper's
    appendix does so ("adam-correction"), and relies on learning-rate warmup instead. LAMB does not clip the gradient by
    its global norm: use ``DistributedOptimizer(clip_norm=...)``.

    Parameters of at most one dimension (biases, norms) have no trust ratio and no weight decay: their update is Adam's.
    Keys of a parameter group change that: see ``Layerwise``. Where a norm is 0 the trust ratio is 1.

    Example::

        optimizer = LAMB(model.parameters(), lr=2e-3, weight_decay=0.01)

    Args:
        params: Parameters or parameter groups, of any real floating-point dtype. Gradients must be dense.
        lr: Learning rate: the length of a step relative to the norm of the weights.
        betas: Decay rates of both moments, from 0 to below 1.
        eps: Added to the root of the second moment.
        weight_decay: Weight decay, within the trust ratio.
        bias_correction: Correct the moments for their start at zero.
        norm_bounds: Lower and upper bound of the weights' norm in the trust ratio; None: no bounds.
        adapt: Whether parameters have a trust ratio; None: those of two or more dimensions.
        decay_1d: Whether weight decay applies to parameters of at most one dimension too.
        foreach: Whether to use torch's foreach kernels; None: except on the CPU, where torch's fused Adam is used.

    Attributes:
        trust_ratios: The last :math:`\phi(\|w\|) / \|r + \lambda w\|` of each parameter that has one, a 0-d tensor.

    Raises:
        ValueError: An argument is out of bounds.
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
        for index, beta in enumerate(betas):
            check_between(f"betas[{index}]", beta, 0, 1)
        check_between("eps", eps, 1e-30)
        if norm_bounds is not None and not 0 <= norm_bounds[0] < norm_bounds[1]:
            raise ValueError(f"norm_bounds={norm_bounds} must be increasing and at least 0")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "norm_bounds": norm_bounds,
            },
            adapt=adapt,
            decay_1d=decay_1d,
            foreach=foreach,
        )

    def _update(
        self,
        group: Mapping[str, Any],
        parameters: list[torch.Tensor],
        grads: list[torch.Tensor],
        *,
        weight_decay: float,
        adapts: bool,
    ) -> None:
        state = self._advance_state(parameters)
        foreach = uses_foreach(group, parameters[0].device) or not all(
            map(_have_same_strides, parameters, grads, state.means, state.squares)
        )
        updates = (_foreach_updates if foreach else _fused_updates)(group, parameters, grads, state, weight_decay)
        lr = float(group["lr"])
        if not adapts:
            torch._foreach_add_(parameters, updates, alpha=-lr)
            return
        weights = norms(parameters)
        if group["norm_bounds"] is not None:
            weights = weights.clamp(*group["norm_bounds"])
        ratios = self._set_trust_ratios(parameters, weights, norms(updates))
        if foreach:
            torch._foreach_mul_(updates, ratios)
            torch._foreach_add_(parameters, updates, alpha=-lr)
            return
        for parameter, update, ratio in zip(parameters, updates, ratios, strict=True):
            parameter.add_(update, alpha=-lr * ratio.item())

    def _advance_state(self, parameters: list[torch.Tensor]) -> _State:
        """Return the state with its step counts advanced by one."""
        for parameter in parameters:
            if "step" not in self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32)
        steps = [self.state[parameter]["step"] for parameter in parameters]
        torch._foreach_add_(steps, 1)
        return _State(steps, self._buffers(parameters, "exp_avg"), self._buffers(parameters, "exp_avg_sq"))


def _foreach_updates(
    group: Mapping[str, Any],
    parameters: list[torch.Tensor],
    grads: list[torch.Tensor],
    state: _State,
    weight_decay: float,
) -> list[torch.Tensor]:
    """Return Adam's direction plus weight decay, r + lambda w."""
    beta1, beta2 = group["betas"]
    torch._foreach_lerp_(state.means, grads, 1 - beta1)
    torch._foreach_mul_(state.squares, beta2)
    torch._foreach_addcmul_(state.squares, grads, grads, 1 - beta2)
    roots = torch._foreach_sqrt(state.squares)
    if group["bias_correction"]:
        steps = [step.item() for step in state.steps]
        torch._foreach_div_(roots, [math.sqrt(1 - beta2**step) for step in steps])
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(state.means, [1 - beta1**step for step in steps])
        torch._foreach_div_(updates, roots)
    else:
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(state.means, roots)
    if weight_decay:
        torch._foreach_add_(updates, parameters, alpha=weight_decay)
    return list(updates)


def _fused_updates(
    group: Mapping[str, Any],
    parameters: list[torch.Tensor],
    grads: list[torch.Tensor],
    state: _State,
    weight_decay: float,
) -> list[torch.Tensor]:
    """Return the same as ``_foreach_updates``, computed by torch's fused Adam: one step from lambda w with lr=-1."""
    updates = [parameter * weight_decay if weight_decay else torch.zeros_like(parameter) for parameter in parameters]
    steps = state.steps
    if not group["bias_correction"]:
        steps = [torch.full_like(step, _FOREVER) for step in steps]
    torch._fused_adam_(
        updates,
        grads,
        state.means,
        state.squares,
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


def _have_same_strides(parameter: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether all have the same strides, without gaps: the fused kernel treats memory as one-dimensional."""
    is_same = all(other.stride() == parameter.stride() for other in others)
    return is_same and torch.empty_like(parameter).stride() == parameter.stride()
