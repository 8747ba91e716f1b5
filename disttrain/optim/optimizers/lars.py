"""LARS: steps proportional to the norm of the weights, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from disttrain.optim.optimizers.layerwise import Layerwise, check_between, norms, uses_foreach


class LARS(Layerwise):
    r"""Layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017, arXiv:1708.03888, algorithm 1).

    .. math::
        \lambda &= \eta \, \|w\| / (\|g\| + \beta \|w\|) \\
        v &\leftarrow m v + \gamma \lambda (g + \beta w) \\
        w &\leftarrow w - v

    with learning rate :math:`\gamma` (``lr``), trust coefficient :math:`\eta`, momentum :math:`m` and weight decay
    :math:`\beta`. As in the paper, the learning rate is inside the momentum buffer: past gradients keep the learning
    rate that they were added with. With ``momentum_correction`` the buffer is kept without the learning rate,
    :math:`w \leftarrow w - \gamma v`, as in torch's SGD, so that past gradients follow the current learning rate (Goyal
    et al. 2017, remark 3).

    Parameters of at most one dimension (biases, norms) have no trust ratio and no weight decay: their update is SGD's.
    Keys of a parameter group change that: see ``Layerwise``. Where a norm is 0 the trust ratio is 1.

    Example::

        optimizer = LARS(model.parameters(), lr=10.0, momentum=0.9, weight_decay=1e-4)

    Args:
        params: Parameters or parameter groups, of any real floating-point dtype. Gradients must be dense.
        lr: Learning rate. The trust coefficient makes it larger than SGD's.
        momentum: From 0 (none, and no state) to below 1.
        weight_decay: Weight decay, within the trust ratio.
        trust_coefficient: Length of a step relative to the norm of the weights, at a learning rate of 1.
        momentum_correction: Keep the momentum buffer without the learning rate.
        eps: Added to the denominator of the trust ratio; the paper has none.
        adapt: Whether parameters have a trust ratio; None: those of two or more dimensions.
        decay_1d: Whether weight decay applies to parameters of at most one dimension too.
        foreach: Whether to use torch's foreach kernels; None: except on the CPU, where a loop is faster.

    Attributes:
        trust_ratios: The last :math:`\lambda` of each parameter that has one, a 0-d tensor.

    Raises:
        ValueError: An argument is out of bounds.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        trust_coefficient: float = 1e-3,
        momentum_correction: bool = False,
        eps: float = 0.0,
        adapt: bool | None = None,
        decay_1d: bool = False,
        foreach: bool | None = None,
    ) -> None:
        check_between("momentum", momentum, 0, 1)
        check_between("trust_coefficient", trust_coefficient, 1e-30)
        check_between("eps", eps, 0)
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "momentum_correction": momentum_correction,
                "eps": eps,
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
        ratios: list[torch.Tensor] | None = None
        if adapts:
            weights = norms(parameters)
            denominators = norms(grads) + weight_decay * weights + group["eps"]
            ratios = self._set_trust_ratios(parameters, group["trust_coefficient"] * weights, denominators)
        inside, outside = 1.0, float(group["lr"])  # factors inside and outside of the momentum buffer
        if group["momentum"] and not group["momentum_correction"]:
            inside, outside = outside, inside
        buffers = self._buffers(parameters, "momentum_buffer") if group["momentum"] else None
        if not uses_foreach(group, parameters[0].device):
            # One parameter at a time, so that it is still in the cache for its next operation.
            for index, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
                scale = inside * (ratios[index].item() if ratios is not None else 1.0)
                if buffers is None:
                    parameter.mul_(1 - outside * scale * weight_decay).add_(grad, alpha=-outside * scale)
                    continue
                buffer = buffers[index].mul_(group["momentum"]).add_(grad, alpha=scale)
                if weight_decay:
                    buffer.add_(parameter, alpha=scale * weight_decay)
                parameter.add_(buffer, alpha=-outside)
            return
        updates = torch._foreach_add(grads, parameters, alpha=weight_decay)
        if ratios is not None:
            torch._foreach_mul_(updates, ratios)
        if buffers is not None:
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates, alpha=inside)
        torch._foreach_add_(parameters, updates if buffers is None else buffers, alpha=-outside)
