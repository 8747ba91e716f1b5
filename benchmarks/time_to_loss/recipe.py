"""What is trained: the GPT and the data of the task ``text``, by a loop as people write it in plain torch.

All frameworks train by the same loop, with the same initial weights and on the same batches.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.speed.frameworks import TrainingSetup
from disttrain import DistributedOptimizer
from disttrain.reduction import Ledger
from disttrain.tasks.text import Text

CLIP_NORM = 1.0
FINAL_LR_FACTOR = 0.1
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Recipe:
    """Model, data and hyperparameters of a run. AdamW and its schedule are those of configs/text.yaml.

    Attributes:
        text: where the text is, as ``task.path``; None is the standard library's source.
        width, layers, context: of the GPT.
        batch_size: samples of a step over all ranks, a multiple of their number.
        steps: of the whole run.
        lr: highest rate; it rises linearly over ``warmup_steps`` and then follows half a cosine down to a tenth.
    """

    text: str | None
    width: int
    layers: int
    context: int
    batch_size: int
    steps: int
    lr: float
    warmup_steps: int

    @cached_property
    def task(self) -> Text:
        return Text(path=self.text, width=self.width, layers=self.layers, context=self.context)

    def build_model(self, seed: int) -> nn.Module:
        """Return the model with initial weights that depend on the seed only."""
        torch.manual_seed(seed)
        return self.task.build_model()

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1)

    def lr_factor(self, step: int) -> float:
        """Return the factor on ``lr`` in step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return FINAL_LR_FACTOR + (1 - FINAL_LR_FACTOR) * 0.5 * (1 + math.cos(math.pi * progress))

    def batches(self, rank: int, world_size: int, seed: int) -> Iterator[torch.Tensor]:
        """Yield this rank's parts of the batches, without end."""
        data: Any = self.task.train_data()
        sampler: Any = DistributedSampler(data, world_size, rank, seed=seed, drop_last=True)
        loader = DataLoader(
            data,
            self.batch_size // world_size,
            sampler=sampler,
            collate_fn=self.task.collate,
            drop_last=True,
            generator=torch.Generator(),  # simulated ranks share torch's global one
        )
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            yield from loader


class TrainingRun:
    """One rank's part of a training run.

    Args:
        recipe: what is trained.
        setup: the model, prepared by a framework.
        rank, world_size: decide about this rank's data.
        seed: of the order of the samples.
        compressors: names of those that do not send dense.
    """

    def __init__(
        self, recipe: Recipe, setup: TrainingSetup, rank: int, world_size: int, seed: int, compressors: set[str]
    ) -> None:
        self.setup, self._task, self._compressors = setup, recipe.task, compressors
        self._schedule = LambdaLR(setup.optimizer, recipe.lr_factor)
        self._batches = recipe.batches(rank, world_size, seed)
        held_out: Any = recipe.task.eval_data()
        self._held_out = held_out.__getitems__(range(rank, len(held_out), world_size))

    def train(self, num_steps: int) -> dict[str, Any]:
        """Train some steps further.

        Returns:
            Of each step ``seconds``, from loading its batch to the optimizer's step, and ``sent_bytes`` and
            ``dense_fractions``, the fraction of the elements sent dense, both None if the framework does not count.
        """
        seconds, sent, fractions = [], [], []
        optimizer = self.setup.optimizer
        ledger = optimizer.wire if isinstance(optimizer, DistributedOptimizer) else None
        for _ in range(num_steps):
            start = time.perf_counter()
            batch = next(self._batches)
            optimizer.zero_grad()
            self._task.loss(self.setup.module, batch).backward()
            self._clip()
            optimizer.step()
            self._schedule.step()
            seconds.append(time.perf_counter() - start)
            sent.append(None if ledger is None else ledger.last_step.sent_bytes)
            fractions.append(None if ledger is None else self._dense_fraction(ledger))
        return {"seconds": seconds, "sent_bytes": sent, "dense_fractions": fractions}

    def _dense_fraction(self, ledger: Ledger) -> float:
        """Return the fraction of the last step's elements that were not sent by a compressor of the setting."""
        buckets = {entry.account.index: entry.account for entry in ledger.entries if entry.account.bucket is not None}
        sizes = [(account.bucket.numel, account.compressor) for account in buckets.values() if account.bucket]
        dense = sum(size for size, compressor in sizes if compressor not in self._compressors)
        return round(dense / max(1, sum(size for size, _ in sizes)), 3)

    def _clip(self) -> None:
        optimizer = self.setup.optimizer
        if isinstance(optimizer, DistributedOptimizer):
            optimizer.clip_grad_norm_(CLIP_NORM)  # as below, but it also works with overlap_step
        else:
            nn.utils.clip_grad_norm_(self.setup.model.parameters(), CLIP_NORM)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, int]:
        """Return the bits on this rank's share of the held-out text, and its bytes."""
        bits, count = 0.0, 0
        self.setup.model.eval()
        for batch in self._held_out.split(EVALUATION_BATCH):
            part, size = self._task.evaluate(self.setup.model, batch)["bits_per_byte"]
            bits, count = bits + float(part), count + size
        self.setup.model.train()
        return bits, count


def mean_loss(shares: Sequence[tuple[float, int]]) -> float | None:
    """Return bits per byte from the results of ``TrainingRun.evaluate`` of all ranks; None if they are not finite."""
    loss = sum(bits for bits, _ in shares) / sum(count for _, count in shares)
    return round(loss, 5) if math.isfinite(loss) else None
