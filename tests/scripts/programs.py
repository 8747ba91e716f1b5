"""Random training programs, and their results in one process and under each legal reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from tests.scripts.nets import make

EXCHANGES = ("backward", "synchronize", "step")
ZEROS = ("zero_by_optimizer", "zero_by_model", "zero_to_none", "zero_in_place")
EDITS = ("halve", "replace")
ALL = frozenset("ab")

Trace = list[tuple[torch.Tensor | None, ...]]


@dataclass(frozen=True)
class Op:
    """One line of a program: ``seed`` of the data, and ``uses``, the parameters that each rank's loss depends on."""

    kind: str
    seed: int = 0
    uses: tuple[frozenset[str], ...] = ()


Program = list[Op]


@st.composite
def programs(draw: st.DrawFn, world_size: int) -> Program:
    """One program for all ranks. Ranks may use different parameters in an exchanged pass. It ends with a step."""
    kinds = draw(st.lists(st.sampled_from(("backward", "backward", "local", "synchronize", "step", *ZEROS, *EDITS))))
    some = st.sampled_from([ALL, frozenset("a"), frozenset("b")])
    program = []
    for seed, kind in enumerate([*kinds, "backward", "step"]):
        uses = [draw(some)] * world_size
        if kind == "backward":
            uses = [draw(some) for _ in range(world_size)]
        program.append(Op(kind, seed, tuple(uses)))
    return program


@st.composite
def programs_by_rank(draw: st.DrawFn, world_size: int) -> list[Program]:
    """Programs that are the same but for up to two lines of one rank. All have the same number of steps."""
    base = draw(programs(world_size))
    odd, program = draw(st.integers(0, world_size - 1)), list(base)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(program) - 1))
        kind = draw(st.sampled_from(("nothing", "backward", "local", "synchronize", *ZEROS, *EDITS)))
        if program[place].kind == "step":
            program.insert(place, Op(kind, 100 + place, base[0].uses))
        else:
            program[place] = Op(kind, program[place].seed, program[place].uses)
    return [program if rank == odd else base for rank in range(world_size)]


def drops(program: Program) -> bool:
    """Whether the program drops means in place of stepping on them."""
    has_means = False
    for op in program:
        if op.kind in ZEROS and has_means:
            return True
        has_means = op.kind in ("backward", "synchronize") or (has_means and op.kind != "step")
    return False


def new_model() -> nn.ParameterDict:
    return make(lambda: nn.ParameterDict({"a": torch.randn(3, 2), "b": torch.randn(2)}))


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Momentum and weight decay make a gradient of zero differ from no gradient."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def loss(model: nn.ParameterDict, op: Op, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * op.seed + rank)
    parts = []
    for name, weight in model.items():
        target = torch.randn(weight.shape, generator=generator)
        if name in op.uses[rank]:
            parts.append((weight - target).square().sum())
    return torch.stack(parts).sum()


def act(op: Op, ranks: Sequence[int], model: nn.ParameterDict, optimizer: Any) -> None:
    """Run one line as ``ranks``: this rank, or all of them in one process."""
    match op.kind:
        case "backward":
            for rank in ranks:
                (loss(model, op, rank) / len(ranks)).backward()
        case "local":
            with optimizer.no_sync():
                for rank in ranks:
                    (loss(model, op, rank) / len(ranks)).backward()
        case "synchronize":
            optimizer.synchronize()
        case "step":
            optimizer.step()
        case "zero_by_optimizer":
            optimizer.zero_grad()
        case "zero_by_model":
            model.zero_grad()
        case "zero_to_none":
            for parameter in model.parameters():
                parameter.grad = None
        case "zero_in_place":
            optimizer.zero_grad(set_to_none=False)
        case "halve":
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)
        case "replace":
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad + 1


def run(program: Program, ranks: Sequence[int], model: nn.ParameterDict, optimizer: Any) -> Trace:
    """Return the gradients after each exchange in backward and synchronize, and the weights after each step."""
    trace: Trace = []
    for op in program:
        act(op, ranks, model, optimizer)
        if op.kind in EXCHANGES:
            parameters = list(model.parameters())
            seen = [p.detach() if op.kind == "step" else p.grad for p in parameters]
            trace.append(tuple(None if tensor is None else tensor.clone() for tensor in seen))
    return trace


class Played:
    """Ranks with programs of their own, played one against the other in one process, as exchanges can be read.

    A rank continues to its next exchange and waits there. Where some are in backward or synchronize and the others at
    their step, the others take part with what they have.

    Args:
        fresh: only what backward has given since the last exchange is sent, and what a rank has done to an earlier mean
            stays its own; else whole gradients are averaged, as DDP does.
        idle: a synchronize with nothing new on this rank is no exchange.
    """

    def __init__(self, programs: Sequence[Program], *, fresh: bool, idle: bool) -> None:
        self.programs, self.fresh, self.idle = programs, fresh, idle
        self.ranks = range(len(programs))
        self.models = [new_model() for _ in self.ranks]
        self.optimizers = [new_optimizer(model) for model in self.models]
        self.known: list[dict[str, torch.Tensor]] = [{} for _ in self.ranks]  # the exchanged part of .grad
        self.is_new = [False for _ in self.ranks]
        self.at = [0 for _ in self.ranks]

    def play(self) -> list[torch.Tensor]:
        """Return the final weights by rank."""
        while True:
            waiting = [self._go_on(rank) for rank in self.ranks]
            if all(op is None for op in waiting):
                return [p.detach() for model in self.models for p in model.parameters()]
            self._meet([op for op in waiting if op is not None])

    def _go_on(self, rank: int) -> Op | None:
        program = self.programs[rank]
        while self.at[rank] < len(program):
            op = program[self.at[rank]]
            is_idle = op.kind == "synchronize" and self.idle and not self.is_new[rank]
            if op.kind in EXCHANGES and not is_idle:
                return op
            self._act(op, rank)
            self.at[rank] += 1
        return None

    def _act(self, op: Op, rank: int) -> None:
        if op.kind in ("local", "backward"):
            loss(self.models[rank], op, rank).backward()
            self.is_new[rank] = True
        elif op.kind not in ("synchronize", "nothing"):
            act(op, [rank], self.models[rank], self.optimizers[rank])
            if op.kind in ZEROS:
                self.known[rank], self.is_new[rank] = {}, False
            for name, tensor in self.known[rank].items():
                self.known[rank][name] = tensor * 0.5 if op.kind == "halve" else tensor + 1

    def _meet(self, waiting: Sequence[Op]) -> None:
        are_early = [op.kind != "step" for op in waiting]
        for rank, op in zip(self.ranks, waiting, strict=True):
            if op.kind == "backward":
                self._act(op, rank)
        if any(are_early) or any(self.is_new):
            self._exchange()
        for rank, op in zip(self.ranks, waiting, strict=True):
            if op.kind != "step":
                self.at[rank] += 1
            elif not any(are_early):
                self.optimizers[rank].step()
                self.at[rank] += 1

    @torch.no_grad()
    def _exchange(self) -> None:
        for name in ("a", "b"):
            grads = [model[name].grad for model in self.models]
            sent = []
            for rank, grad in zip(self.ranks, grads, strict=True):
                known = self.known[rank].get(name) if self.fresh else None
                sent.append(grad if known is None or grad is None else grad - known)
            if all(grad is None for grad in grads):
                continue
            mean = sum(torch.zeros_like(self.models[0][name]) if part is None else part for part in sent) / len(sent)
            for rank in self.ranks:
                kept = self.known[rank].get(name) if self.fresh else None
                self.models[rank][name].grad = mean.clone() if kept is None else kept + mean
                self.known[rank][name] = self.models[rank][name].grad.clone()
        self.is_new = [False for _ in self.ranks]
