"""What the step-time bench runs: models of a given size, and the ways to train them that it compares.

Run as a script this is one worker. It takes its orders from the bench over a Unix socket, which reaches into any
network namespace without touching the network that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import disttrain  # noqa: E402


class Attention(nn.Module):
    """Causal self-attention, then a feed-forward layer, each on a normalised residual stream."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        query, key, value = self.qkv(self.norm_1(x)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = (
            F.scaled_dot_product_attention(query, key, value, is_causal=True)
            .transpose(1, 2)
            .reshape(batch, length, width)
        )
        x = x + self.out(mixed)
        fed: torch.Tensor = self.down(F.gelu(self.up(self.norm_2(x))))
        return x + fed


class GPT(nn.Module):
    def __init__(self, vocabulary: int = 5000, width: int = 256, num_layers: int = 8, length: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Attention(width, num_heads=8) for _ in range(num_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: torch.Tensor = self.head(self.norm(self.layers(x)))
        return logits.flatten(0, 1)


def mlp(width: int = 1024, num_layers: int = 10) -> nn.Module:
    layers = [layer for _ in range(num_layers) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "gpt": GPT}


def make_batch(model: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + rank)
    if model == "mlp":
        return torch.randn(32, 1024, generator=generator), torch.randint(1024, (32,), generator=generator)
    tokens = torch.randint(5000, (2, 65), generator=generator)
    return tokens[:, :-1], tokens[:, 1:].flatten()


@dataclass
class Entry:
    """One way to train: ``module`` is called for the forward pass, ``model`` holds the parameters."""

    model: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer


class Contender(ABC):
    """A library, joined to its other ranks. ``enter`` gives it a model to train with one of its settings."""

    rank: int

    @abstractmethod
    def enter(self, model: nn.Module, setting: Mapping[str, Any], bucket_mb: float | None) -> Entry: ...

    @abstractmethod
    def barrier(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


ALONE = {"name": "alone"}


class Disttrain(Contender):
    """This project; settings are compressors, or ``ALONE``: every worker trains its own model.

    With ``overlap_step: true`` among a compressor's options the optimizer is made so, as the trainer makes it. The
    engine is found from the launcher's environment, as for any user.
    """

    def __init__(self) -> None:
        self.comm = disttrain.init(device="cpu", timeout=120)
        self.rank = self.comm.rank

    def enter(self, model: nn.Module, setting: Mapping[str, Any], bucket_mb: float | None) -> Entry:
        if setting == ALONE:
            return Entry(model, model, sgd(model))
        compressor = {key: value for key, value in setting.items() if key != "overlap_step"}
        optimizer = disttrain.DistributedOptimizer(
            sgd(model),
            model,
            comm=self.comm,
            compressor=compressor,
            bucket_mb=bucket_mb,
            overlap_step=bool(setting.get("overlap_step")),
        )
        return Entry(model, model, optimizer)

    def barrier(self) -> None:
        self.comm.barrier()

    def close(self) -> None:
        self.comm.close()


class TorchDDP(Contender):
    """torch's DistributedDataParallel with its default settings; settings are its communication hooks."""

    def __init__(self) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        self.rank = dist.get_rank()

    def enter(self, model: nn.Module, setting: Mapping[str, Any], bucket_mb: float | None) -> Entry:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        # PowerSGD waits inside gloo's callbacks and hangs with several buckets, so it gets one.
        cap = 1000 if setting["name"] == "powersgd" else None
        module = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=cap)
        if setting["name"] == "fp16":
            module.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif setting["name"] == "powersgd":
            state = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=4, start_powerSGD_iter=2, orthogonalization_epsilon=1e-8
            )
            module.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return Entry(model, module, sgd(model))

    def barrier(self) -> None:
        import torch.distributed as dist

        dist.barrier()

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


class HorovodOptimizer(Contender):
    """Horovod's own DistributedOptimizer with its default settings; fp16 is its own compression."""

    def __init__(self) -> None:
        import horovod.torch as hvd

        hvd.init()
        self.rank = hvd.rank()

    def enter(self, model: nn.Module, setting: Mapping[str, Any], bucket_mb: float | None) -> Entry:
        import horovod.torch as hvd

        compression = hvd.Compression.fp16 if setting["name"] == "fp16" else hvd.Compression.none
        optimizer = hvd.DistributedOptimizer(
            sgd(model), named_parameters=model.named_parameters(), compression=compression
        )
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        return Entry(model, model, optimizer)

    def barrier(self) -> None:
        import horovod.torch as hvd

        hvd.barrier()

    def close(self) -> None:
        import horovod.torch as hvd

        hvd.shutdown()


CONTENDERS: dict[str, Callable[[], Contender]] = {
    "disttrain": Disttrain,
    "ddp": TorchDDP,
    "horovod": HorovodOptimizer,
}


def take_steps(
    contender: Contender, entry: Entry, batch: tuple[torch.Tensor, torch.Tensor], warm_up: int, num_steps: int
) -> dict[str, Any]:
    """Train on one batch; seconds of each step after the first ``warm_up``, and the CPU seconds of all those."""
    inputs, targets = batch
    times: list[float] = []
    used = 0.0
    contender.barrier()
    for step in range(warm_up + num_steps):
        if step == warm_up:
            used = -_cpu_seconds()
        start = time.perf_counter()
        entry.optimizer.zero_grad()
        F.cross_entropy(entry.module(inputs), targets).backward()
        entry.optimizer.step()
        times.append(time.perf_counter() - start)
    sent = (
        entry.optimizer.wire.last_step.sent_bytes
        if isinstance(entry.optimizer, disttrain.DistributedOptimizer)
        else None
    )
    return {
        "seconds": times[warm_up:],
        "cpu_seconds": (used + _cpu_seconds()) / max(num_steps, 1),
        "sent_bytes": sent,
    }


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def fingerprint(entry: Entry, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """The loss on this rank's batch and the sum of all parameters: contenders that do the same work have them equal."""
    with torch.no_grad():
        loss = F.cross_entropy(entry.model(batch[0]), batch[1]).item()
        return {"loss": loss, "parameters": sum(p.double().sum().item() for p in entry.model.parameters())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", choices=list(CONTENDERS), required=True)
    parser.add_argument("--model", choices=list(MODELS), required=True)
    parser.add_argument("--bucket-mb", type=float, default=None)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--socket", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    contender = CONTENDERS[arguments.contender]()
    batch = make_batch(arguments.model, contender.rank)
    entries: list[Entry] = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(arguments.socket)
        stream = connection.makefile("rw")

        def say(value: Any) -> None:
            stream.write(json.dumps(value) + "\n")
            stream.flush()

        say({"contender": arguments.contender, "rank": contender.rank, "pid": os.getpid()})
        while order := stream.readline():
            match json.loads(order):
                case {"do": "enter", "setting": setting}:
                    torch.manual_seed(0)
                    entries.append(contender.enter(MODELS[arguments.model](), setting, arguments.bucket_mb))
                    say({})
                case {"do": "step", "entry": index, "warm_up": warm_up, "steps": num_steps}:
                    say(take_steps(contender, entries[index], batch, warm_up, num_steps))
                case {"do": "fingerprint", "entry": index}:
                    say(fingerprint(entries[index], batch))
                case _:
                    break
    contender.close()


if __name__ == "__main__":
    main()
