"""The world of a loop in each form: one process that acts as all ranks, torch DDP, or disttrain."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import disttrain
from disttrain.comm import Communicator

ROWS = 12  # of a batch over all ranks: 2, 3 and 4 ranks get equal parts


class World:
    """Attributes: ``size`` is the number of ranks, ``ranks`` are those that this process acts as."""

    def __init__(self, size: int, ranks: Sequence[int]) -> None:
        self.size, self.ranks = size, ranks

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the rows of a batch for this process's ranks."""
        parts = whole.chunk(self.size)
        return torch.cat([parts[rank] for rank in self.ranks])

    def batches(self, steps: int = 4, rows: int = ROWS, seed: int = 1, **shape: int) -> Iterator[list[torch.Tensor]]:
        """Yield inputs and targets, this process's rows of each batch."""
        for step in range(steps):
            yield [self.part(tensor) for tensor in batch(seed + step, rows, **shape)]

    def sample(self, step: int, rank: int, rows: int = 4, **shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch of one rank, for loops in which ranks do different things."""
        return batch(1000 * (step + 1) + rank, rows, **shape)

    def shares(self, model: nn.Module) -> Iterator[int]:
        """Yield ``ranks`` one after another, each with its own buffers (BatchNorm statistics)."""
        yield from self.ranks

    def wrap_model(self, model: nn.Module, **options: Any) -> nn.Module:
        """Return DDP around the model in that form, else the model itself. ``options`` are DDP's."""
        return model

    def wrap(self, optimizer: Optimizer, model: nn.Module, **options: Any) -> Any:
        """Return a DistributedOptimizer with these ``options`` in that form, else torch's with the same methods."""
        raise NotImplementedError

    def close(self) -> None:
        """Called when the loop has ended."""


def batch(seed: int, rows: int, features: int = 8, outputs: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator), torch.randn(rows, outputs, generator=generator)


class OneProcess(World):
    """Acts as all ranks: on the joined batch, or rank by rank."""

    def __init__(self, size: int) -> None:
        super().__init__(size, range(size))
        self._buffers: dict[nn.Module, list[dict[str, torch.Tensor]]] = {}

    def shares(self, model: nn.Module) -> Iterator[int]:
        for rank in self.ranks:
            own = self._buffers_of(model)[rank]
            for name, tensor in model.named_buffers():
                tensor.copy_(own[name])
            yield rank
            own.update({name: tensor.clone() for name, tensor in model.named_buffers()})

    def _buffers_of(self, model: nn.Module) -> list[dict[str, torch.Tensor]]:
        if model not in self._buffers:
            initial = {name: tensor.clone() for name, tensor in model.named_buffers()}
            self._buffers[model] = [dict(initial) for _ in self.ranks]
        return self._buffers[model]

    def _synchronize_buffers(self, model: nn.Module) -> None:
        everyones = self._buffers_of(model)
        for name, tensor in model.named_buffers():
            values = [own[name] for own in everyones]
            tensor.copy_(torch.stack(values).mean(0) if tensor.is_floating_point() else values[0])

    def wrap(self, optimizer: Optimizer, model: nn.Module, **options: Any) -> Any:
        return plain(
            optimizer,
            no_sync=contextlib.nullcontext,
            synchronize=lambda: True,
            synchronize_buffers=lambda: self._synchronize_buffers(model),
            scale=RunningMean(optimizer).scale,
            skipped_steps=0,
        )


def plain(optimizer: Optimizer, **methods: Any) -> Any:
    """Give a torch optimizer the further methods of a ``DistributedOptimizer``, so that loops fit all forms."""
    for name, method in methods.items():
        setattr(optimizer, name, method)
    return optimizer


class RunningMean:
    """``DistributedOptimizer.scale`` for one process: gradients are those of sum(weight * loss) / sum(weight)."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.total = optimizer, 0.0
        optimizer.register_step_post_hook(lambda *_: self.reset())

    def reset(self) -> None:
        self.total = 0.0

    def scale(self, loss: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        before, self.total = self.total, self.total + float(weight)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and before:
                    parameter.grad.mul_(before / self.total)
        return loss * (float(weight) / self.total)


class DataParallel(World):
    """One rank under torch DDP."""

    def __init__(self) -> None:
        super().__init__(dist.get_world_size(), [dist.get_rank()])

    def wrap_model(self, model: nn.Module, **options: Any) -> nn.Module:
        return DistributedDataParallel(model, broadcast_buffers=False, **options)

    def wrap(self, optimizer: Optimizer, model: nn.Module, **options: Any) -> Any:
        return plain(
            optimizer,
            no_sync=getattr(model, "no_sync", contextlib.nullcontext),
            synchronize=lambda: True,
            synchronize_buffers=lambda: _average_buffers(model),
            scale=self._scale,
            skipped_steps=0,
        )

    def _scale(self, loss: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """For one pass a step, as DDP scripts do it."""
        total = torch.tensor(float(weight))
        dist.all_reduce(total)
        return loss * (float(weight) * self.size / total.item())


def _average_buffers(model: nn.Module) -> None:
    for tensor in model.buffers():
        if tensor.is_floating_point():
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


class Disttrain(World):
    """One rank under disttrain; with ``telescopes`` it records what ``Balance`` needs."""

    def __init__(self, comm: Communicator, compressor: str | Mapping[str, Any], telescopes: bool = False) -> None:
        super().__init__(comm.world_size, [comm.rank])
        self.comm, self.compressor, self.telescopes = comm, compressor, telescopes
        self.balances: list[Balance] = []

    def wrap(self, optimizer: Optimizer, model: nn.Module, **options: Any) -> Any:
        options = {"compressor": self.compressor, **options}
        wrapped = disttrain.DistributedOptimizer(optimizer, model, comm=self.comm, **options)
        if self.telescopes:
            self.balances.append(Balance(wrapped, model))
        return wrapped

    def close(self) -> None:
        for balance in self.balances:
            balance.close()


class Balance:
    """One rank's part of: -(w_T - w_0) / lr + mean residual over ranks == mean sum of gradients over ranks.

    Tensor hooks record the gradients before anything changes them.
    """

    def __init__(self, optimizer: Any, model: nn.Module) -> None:
        self.optimizer = optimizer
        optimized = {p for group in optimizer.param_groups for p in group["params"]}
        self.parameters = {name: p for name, p in model.named_parameters() if p in optimized and p.requires_grad}
        self.rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        self.before = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()}
        self.hooks = [p.register_hook(self._hook(self.sums[name])) for name, p in self.parameters.items()]

    @staticmethod
    def _hook(total: torch.Tensor) -> Any:
        def add(grad: torch.Tensor) -> None:
            total.add_(grad.detach().to_dense())

        return add

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def numbers(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return, by parameter, the ``received`` updates, the ``sum`` of this rank's gradients, and its residuals."""
        per_rank = self.optimizer.state_dict()["compression"]["per_rank"]
        return {
            name: {
                "received": (self.before[name] - p.detach()) / self.rates[p],
                "sum": self.sums[name],
                "residual": per_rank.get(f"{name}/residual", torch.zeros(0)).clone(),
                "server_residual": per_rank.get(f"{name}/server_residual", torch.zeros(0)).clone(),
            }
            for name, p in self.parameters.items()
        }
