"""The frameworks that the step-time benchmark compares: disttrain, torch DDP, Horovod.

To add one, subclass ``Framework`` and register it in ``FRAMEWORKS``; `benchmarks/README.md` lists the other steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

import disttrain
from disttrain.comm import Communicator


@dataclass
class TrainingSetup:
    """A model, prepared by a framework.

    Attributes:
        model: holds the parameters.
        module: is called for the forward pass; the model itself or the framework's wrapper.
        optimizer: steps on averaged gradients.
    """

    model: nn.Module
    module: nn.Module
    optimizer: Optimizer


class Framework(ABC):
    """A framework on one rank. Its constructor joins the process group."""

    rank: int

    @abstractmethod
    def prepare(
        self, model: nn.Module, inner: Optimizer, setting: Mapping[str, Any], bucket_mb: float | None
    ) -> TrainingSetup:
        """Make ``model`` ready for training.

        Args:
            model: has the same initial weights on every rank and in every framework.
            inner: steps on the averaged gradients of ``model``.
            setting: the compressor or communication hook, by ``name``, and its options.
            bucket_mb: size of gradient buckets; None is the framework's default.
        """

    @abstractmethod
    def barrier(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


NO_EXCHANGE = {"name": "alone"}
POWERSGD_START = 2
"""The first step that torch's PowerSGD hook may compress."""


class Disttrain(Framework):
    """disttrain. A setting is a compressor, or ``NO_EXCHANGE``: every worker trains a model of its own.

    ``overlap_step`` among a compressor's options goes to the optimizer. The engine is the one that the launcher's
    environment implies, or ``comm``, if given.
    """

    def __init__(self, comm: Communicator | None = None) -> None:
        self.comm = comm or disttrain.init(device="cpu", timeout=120)
        self.rank = self.comm.rank

    def prepare(
        self, model: nn.Module, inner: Optimizer, setting: Mapping[str, Any], bucket_mb: float | None
    ) -> TrainingSetup:
        if setting == NO_EXCHANGE:
            return TrainingSetup(model, model, inner)
        compressor = {key: value for key, value in setting.items() if key != "overlap_step"}
        optimizer = disttrain.DistributedOptimizer(
            inner,
            model,
            comm=self.comm,
            compressor=compressor,
            bucket_mb=bucket_mb,
            overlap_step=bool(setting.get("overlap_step")),
        )
        return TrainingSetup(model, model, optimizer)

    def barrier(self) -> None:
        self.comm.barrier()

    def close(self) -> None:
        self.comm.close()


class TorchDDP(Framework):
    """torch's DistributedDataParallel with its default options. A setting is a communication hook.

    That of ``powersgd`` may have a ``rank`` and the step at which compression ``start``s.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        self.rank = dist.get_rank()

    def prepare(
        self, model: nn.Module, inner: Optimizer, setting: Mapping[str, Any], bucket_mb: float | None
    ) -> TrainingSetup:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        # The PowerSGD hook blocks inside gloo's callbacks and deadlocks with more than one bucket.
        cap = 1000 if setting["name"] == "powersgd" else None
        module = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=cap)
        if setting["name"] == "fp16":
            module.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif setting["name"] == "powersgd":
            state = powerSGD_hook.PowerSGDState(
                None,
                matrix_approximation_rank=setting.get("rank", 4),
                start_powerSGD_iter=setting.get("start", POWERSGD_START),
                orthogonalization_epsilon=1e-8,
            )
            module.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return TrainingSetup(model, module, inner)

    def barrier(self) -> None:
        import torch.distributed as dist

        dist.barrier()

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


class Horovod(Framework):
    """Horovod's DistributedOptimizer with its default options. The only setting is its fp16 compression."""

    def __init__(self) -> None:
        import horovod.torch as hvd

        hvd.init()
        self.rank = hvd.rank()

    def prepare(
        self, model: nn.Module, inner: Optimizer, setting: Mapping[str, Any], bucket_mb: float | None
    ) -> TrainingSetup:
        import horovod.torch as hvd

        compression = hvd.Compression.fp16 if setting["name"] == "fp16" else hvd.Compression.none
        optimizer = hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters(), compression=compression)
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        return TrainingSetup(model, model, optimizer)

    def barrier(self) -> None:
        import horovod.torch as hvd

        hvd.barrier()

    def close(self) -> None:
        import horovod.torch as hvd

        hvd.shutdown()


FRAMEWORKS: dict[str, Callable[[], Framework]] = {"disttrain": Disttrain, "ddp": TorchDDP, "horovod": Horovod}
