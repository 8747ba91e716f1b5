"""Base of LARS and LAMB: a trust ratio per parameter, and rules for which parameters adapt and decay."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class Layerwise(Optimizer):
    """An optimizer that scales the step of each parameter by a trust ratio, the quotient of two norms.

    A parameter here is what the papers call a layer. Each parameter is updated independently of all others, so a step
    may update only those that have a gradient.

    Keys of a parameter group, besides those of the subclass:

    - ``weight_decay``;
    - ``decay_1d``: whether weight decay applies to parameters of at most one dimension too (biases, norms);
    - ``adapt``: whether the parameters have a trust ratio; None: those of two or more dimensions have one, as in the
      experiments of both papers;
    - ``foreach``: whether to use torch's foreach kernels; None: except on the CPU.

    Args:
        params: Parameters or parameter groups.
        defaults: Default options of the subclass, with ``lr`` and ``weight_decay``.
        adapt, decay_1d, foreach: Defaults of the keys above.

    Attributes:
        trust_ratios: The trust ratio of each parameter in its last step: a 0-d tensor on the parameter's device.

    Raises:
        ValueError: ``lr`` or ``weight_decay`` is negative.
    """

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, adapt: bool | None, decay_1d: bool, foreach: bool | None
    ) -> None:
        check_between("lr", defaults["lr"], 0)
        check_between("weight_decay", defaults["weight_decay"], 0)
        super().__init__(params, {**defaults, "adapt": adapt, "decay_1d": decay_1d, "foreach": foreach})
        self.trust_ratios: dict[torch.Tensor, torch.Tensor] = {}

    @abstractmethod
    def _update(
        self,
        group: Mapping[str, Any],
        parameters: list[torch.Tensor],
        grads: list[torch.Tensor],
        *,
        weight_decay: float,
        adapts: bool,
    ) -> None:
        """Update parameters of one group, device and dtype by their gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            batches: defaultdict[Any, list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None or parameter.numel() == 0:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
                decay = group["weight_decay"] if parameter.dim() > 1 or group["decay_1d"] else 0.0
                adapts = parameter.dim() > 1 if group["adapt"] is None else group["adapt"]
                batches[parameter.device, parameter.dtype, decay, adapts].append(parameter)
            for (*_, decay, adapts), parameters in batches.items():
                grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
                self._update(group, parameters, grads, weight_decay=decay, adapts=adapts)
        return loss

    def _set_trust_ratios(
        self, parameters: list[torch.Tensor], numerators: torch.Tensor, denominators: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the quotient for each parameter, and keep it in ``trust_ratios``.

        It is 1 where the numerator or the denominator is 0: otherwise a parameter at zero would stay there.
        """
        ones = torch.ones_like(numerators)
        is_positive = (numerators > 0) & (denominators > 0)
        quotients = torch.where(is_positive, numerators / torch.where(is_positive, denominators, ones), ones)
        ratios = list(quotients.unbind())
        self.trust_ratios.update(zip(parameters, ratios, strict=True))
        return ratios

    def _buffers(self, parameters: list[torch.Tensor], name: str) -> list[torch.Tensor]:
        """Return a tensor of the optimizer's state for each parameter. It starts at zero."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return [self.state[parameter][name] for parameter in parameters]


def trust_ratios(optimizer: Optimizer, model: nn.Module) -> dict[str, float]:
    """Return the last trust ratio of each parameter that has one, as "trust_ratio/<name>", for metrics."""
    if not isinstance(optimizer, Layerwise):
        return {}
    ratios = {n: optimizer.trust_ratios[p] for n, p in model.named_parameters() if p in optimizer.trust_ratios}
    if not ratios:
        return {}
    values = torch.stack([ratio.double().cpu() for ratio in ratios.values()]).tolist()
    return {f"trust_ratio/{name}": value for name, value in zip(ratios, values, strict=True)}


def uses_foreach(group: Mapping[str, Any], device: torch.device) -> bool:
    """Whether to update parameters with torch's foreach kernels, which suit GPUs."""
    return group["foreach"] if group["foreach"] is not None else device.type != "cpu"


def norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the 2-norm of each tensor, in at least float32: norms may overflow float16."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=wide))


def check_between(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise ValueError unless low <= value < high."""
    if not low <= value < high:
        raise ValueError(f"{name}={value} must be at least {low:g}" + (f" and below {high:g}" if high < 1e30 else ""))
