"""LARS: steps whose length is a part of the weights' norm, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from disttrain.optim.optimizers.layerwise import Layerwise, check_between, norms, quotient, uses_lists


class LARS(Layerwise):
    r"""Layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017, arXiv:1708.03888, algorithm 1).

    .. math::
        \lambda &= \eta \, \|w\| / (\|g\| + \beta \|w\|) \\
        v &\leftarrow m v + \gamma \lambda (g + \beta w) \\
        w &\leftarrow w - v

    with the learning rate :math:`\gamma` (``lr``), the trust coefficient :math:`\eta`, momentum :math:`m` and weight
    decay :math:`\beta`. The rate is within the momentum, as the paper has it, so what was gathered at one rate goes on
    with it when the rate changes. ``momentum_correction`` makes history follow the rate instead (Goyal et al. 2017,
    remark 3): it is kept without the rate, :math:`w \leftarrow w - \gamma v`, as torch's SGD does.

    Parameters of one dimension or none (biases, norms) have neither a trust ratio nor decay: they take steps of SGD.
    Keys of a group change that: see ``Layerwise``. Where a norm is 0 the trust ratio is 1.

    Example::

        optimizer = LARS(model.parameters(), lr=10.0, momentum=0.9, weight_decay=1e-4)

    Args:
        params: parameters, or groups of them, of any real floating-point dtype and device; gradients must be dense.
        lr: the learning rate; the trust coefficient makes it larger than SGD's.
        momentum: from 0 (none, and no state) to below 1.
        weight_decay: within the trust ratio, as in the formula.
        trust_coefficient: the length of a step as a part of the weights' norm, at a rate of 1.
        momentum_correction: see above.
        eps: added to the trust ratio's denominator; the paper has none.
        adapt: whether parameters have a trust ratio; None: those of two dimensions or more.
        decay_1d: whether weight decay also holds for parameters of one dimension or none.
        foreach: whether to go over lists of tensors; None: except on the CPU, where one after another is faster.

    Attributes:
        trust_ratios: the last :math:`\lambda` of each parameter that has one, a 0-d tensor.

    Raises:
        ValueError: an argument is out of bounds.
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
        check_between("lr", lr, 0)
        check_between("momentum", momentum, 0, 1)
        check_between("weight_decay", weight_decay, 0)
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
                "adapt": adapt,
                "decay_1d": decay_1d,
                "foreach": foreach,
            },
        )

    def _update(
        self, group: Mapping[str, Any], parameters: list[torch.Tensor], weight_decay: float, adapts: bool
    ) -> None:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        ratios: list[torch.Tensor] | None = None
        if adapts:
            weights = norms(parameters)
            lengths = norms(grads) + weight_decay * weights + group["eps"]
            ratios = self._note(parameters, quotient(group["trust_coefficient"] * weights, lengths))
        inside, outside = 1.0, float(group["lr"])
        if group["momentum"] and not group["momentum_correction"]:
            inside, outside = outside, inside
        buffers = self._buffers(parameters) if group["momentum"] else None
        if not uses_lists(group, parameters[0].device):
            # One after another, so that each is still in the cache for its next operation.
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

    def _buffers(self, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                self.state[parameter]["momentum_buffer"] = buffer
        return [self.state[parameter]["momentum_buffer"] for parameter in parameters]
