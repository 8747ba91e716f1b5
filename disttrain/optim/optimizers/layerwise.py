"""What LARS and LAMB share: a trust ratio for each parameter, and which parameters have one and decay."""

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

    A parameter here is what the papers call a layer. Each is treated for itself, so gradients may come in parts, and
    only those that are there are stepped on.

    Keys of a group, beside those of the subclass: ``weight_decay``; ``decay_1d``, whether it also holds for parameters
    of one dimension or none (biases, norms), which it does not by default; ``adapt``, whether the group's parameters
    have a trust ratio (None: those of two dimensions or more, as both papers' experiments do).

    Attributes:
        trust_ratios: of each parameter that has one, that of its last step, a 0-d tensor on its device.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.trust_ratios: dict[torch.Tensor, torch.Tensor] = {}

    @abstractmethod
    def _update(
        self, group: Mapping[str, Any], parameters: list[torch.Tensor], weight_decay: float, adapts: bool
    ) -> None:
        """Step on parameters of one group, device and dtype, all of which have a gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: defaultdict[Any, list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None or parameter.numel() == 0:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not take sparse gradients")
                decay = group["weight_decay"] if parameter.dim() > 1 or group["decay_1d"] else 0.0
                adapts = parameter.dim() > 1 if group["adapt"] is None else group["adapt"]
                alike[parameter.device, parameter.dtype, decay, adapts].append(parameter)
            for (*_, decay, adapts), parameters in alike.items():
                self._update(group, parameters, decay, adapts)
        return loss

    def _note(self, parameters: list[torch.Tensor], ratios: torch.Tensor) -> list[torch.Tensor]:
        """The ratios one by one, remembered."""
        parts = list(ratios.unbind())
        self.trust_ratios.update(zip(parameters, parts, strict=True))
        return parts


def trust_ratios(optimizer: Optimizer, model: nn.Module) -> dict[str, float]:
    """The last trust ratio of each parameter that has one, as "trust_ratio/<name>", for metrics and TensorBoard."""
    if not isinstance(optimizer, Layerwise):
        return {}
    ratios = {n: optimizer.trust_ratios[p] for n, p in model.named_parameters() if p in optimizer.trust_ratios}
    if not ratios:
        return {}
    values = torch.stack([ratio.double().cpu() for ratio in ratios.values()]).tolist()
    return {f"trust_ratio/{name}": value for name, value in zip(ratios, values, strict=True)}


def uses_lists(group: Mapping[str, Any], device: torch.device) -> bool:
    """Whether to work on lists of tensors, as GPUs like it."""
    return group["foreach"] if group["foreach"] is not None else device.type != "cpu"


def norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of each tensor, in one of at least fp32: in fp16 it would overflow."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=wide))


def quotient(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """``numerator / denominator``; 1 where either is 0: a parameter at zero must be able to leave it."""
    ones = torch.ones_like(numerator)
    is_sound = (numerator > 0) & (denominator > 0)
    return torch.where(is_sound, numerator / torch.where(is_sound, denominator, ones), ones)


def check_between(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise ValueError unless low <= value < high."""
    if not low <= value < high:
        raise ValueError(f"{name}={value} must be at least {low:g}" + (f" and below {high:g}" if high < 1e30 else ""))
