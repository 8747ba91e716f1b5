"""Runs of several variants by processes, which take turns: whole runs, and the times of their kinds of steps."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from benchmarks.network import ShapedNetwork
from benchmarks.speed.worker_group import WorkerGroup
from benchmarks.time_to_loss.composition import DENSE, REFRESH, SHORT_WARMUP, Variant, find_kinds, forms_of
from benchmarks.time_to_loss.recipe import Recipe, mean_loss

PORT = 29400
REPLY_TIMEOUT = 3600.0  # seconds, for training between two evaluations


@dataclass
class Cluster:
    """Where and how variants are trained.

    Attributes:
        workers: their number.
        network: where they run; None is the loopback interface.
        at_once: models of disttrain in one process; further ones get further processes.
    """

    workers: int
    network: ShapedNetwork | None
    at_once: int = 6


@dataclass
class _Member:
    """A run, in the processes of a group, and what its steps have sent, see ``TrainingRun.train``."""

    group: WorkerGroup
    index: int
    sent_bytes: list[int | None] = field(default_factory=list)
    dense_fractions: list[float | None] = field(default_factory=list)

    def train(self, num_steps: int) -> np.ndarray:
        """Return the seconds of each step, the mean over workers."""
        replies = self.group.request(do="train", run=self.index, num_steps=num_steps)
        self.sent_bytes += replies[0]["sent_bytes"]
        self.dense_fractions += replies[0]["dense_fractions"]
        seconds: np.ndarray = np.mean([reply["seconds"] for reply in replies], axis=0)
        return seconds

    def evaluate(self) -> float | None:
        return mean_loss([reply["share"] for reply in self.group.request(do="evaluate", run=self.index)])


@contextlib.contextmanager
def start(cluster: Cluster, recipe: Recipe, variants: Sequence[Variant], seed: int) -> Iterator[list[_Member]]:
    """Start the processes, and prepare a run for each variant.

    DDP without a hook has processes to itself, as users have it: with several models in its processes its steps are
    faster.
    """
    parts: dict[tuple[str, int], list[Variant]] = {}
    for variant in variants:
        same = sum(len(part) for (name, _), part in parts.items() if name == variant.group)
        parts.setdefault((variant.group, same // cluster.at_once), []).append(variant)
    members: dict[Variant, _Member] = {}
    with contextlib.ExitStack() as stack:
        for number, part in enumerate(parts.values()):
            group = WorkerGroup(
                part[0].who,
                "env",
                cluster.workers,
                ["--recipe", json.dumps(asdict(recipe)), "--workers", str(cluster.workers)],
                cluster.network,
                num_threads=max(1, (os.cpu_count() or 1) // cluster.workers),
                port=PORT + number,
                module="benchmarks.time_to_loss.worker",
                reply_timeout=REPLY_TIMEOUT,
            )
            stack.enter_context(group)
            for index, variant in enumerate(part):
                group.request(do="prepare", setting=variant.setting, seed=seed)
                members[variant] = _Member(group, index)
        yield [members[variant] for variant in variants]


def train_runs(
    cluster: Cluster, recipe: Recipe, variants: Sequence[Variant], seed: int, evaluate_every: int
) -> list[dict[str, Any]]:
    """Train all variants from start to end, alternating between two evaluations, whose time does not count.

    Returns:
        For each variant ``evaluations``, each with step, seconds of training and bits per byte; ``sent_bytes`` and
        ``dense_fractions`` of each step.
    """
    with start(cluster, recipe, variants, seed) as members:
        seconds = [0.0] * len(members)
        evaluations: list[list[list[float | None]]] = [[[0, 0.0, member.evaluate()]] for member in members]
        step = 0
        while step < recipe.steps:
            num_steps = min(evaluate_every, recipe.steps - step)
            order = list(enumerate(members))
            for number, member in order if step // evaluate_every % 2 == 0 else reversed(order):
                seconds[number] += float(member.train(num_steps).sum())
                evaluations[number].append([step + num_steps, round(seconds[number], 4), member.evaluate()])
            step += num_steps
        return [
            {"evaluations": found, "sent_bytes": member.sent_bytes, "dense_fractions": member.dense_fractions}
            for member, found in zip(members, evaluations, strict=True)
        ]


def time_kinds(
    cluster: Cluster, recipe: Recipe, variants: Sequence[Variant], turns: int, num_steps: int
) -> list[dict[str, list[list[float]]]]:
    """Time the kinds of steps of each variant, in turns of an untimed step and ``num_steps`` timed ones.

    A variant that starts dense is trained twice: dense all the time, and dense in a few untimed steps only.

    Returns:
        For each variant the seconds by kind: a list for each turn, of those of its steps that were of this kind.
    """
    trained = [
        (number, form, place > 0)
        for number, variant in enumerate(variants)
        for place, form in enumerate(forms_of(variant))
    ]
    found: list[dict[str, list[list[float]]]] = [{} for _ in variants]
    with start(cluster, recipe, [form for _, form, _ in trained], seed=0) as members:
        for member in members:
            member.train(SHORT_WARMUP + 3)
        order = list(zip(trained, members, strict=True))
        for turn in range(turns):
            for (number, form, is_soon_compressed), member in order if turn % 2 == 0 else reversed(order):
                seconds = member.train(1 + num_steps)
                kinds = find_kinds(form, member.dense_fractions)[-num_steps:]
                for kind, value in zip(kinds, seconds[1:].tolist(), strict=True):
                    # The second form's warmup is over: what is dense is a refresh, even before a compressed step.
                    its = REFRESH if is_soon_compressed and kind == DENSE else kind
                    lists = found[number].setdefault(its, [[] for _ in range(turns)])
                    lists[turn].append(round(value, 5))
    return found
