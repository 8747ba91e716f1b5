"""What a compressor is: an algorithm written as a generator in which every ``yield`` is one crossing of the wire.

A compressor does no I/O. The reducer runs it over real engines, the simulator runs N of them in one process, a test
drives one by hand.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from pydantic import Field

from disttrain.collectives import AllGather, AllReduce, AllToAll, Broadcast, Collective
from disttrain.validation import Registry, Section

NewState: TypeAlias = dict[str, torch.Tensor]
Program: TypeAlias = Generator[Collective, Any, tuple[torch.Tensor, NewState]]

REGISTRY: dict[str, type[Compressor]] = {}


@dataclass(frozen=True)
class Hierarchy:
    """This rank among those of its node, and among those with its place on all nodes. Nodes have equally many ranks."""

    node_rank: int
    node_size: int
    across_rank: int
    num_nodes: int


@dataclass(frozen=True)
class Bucket:
    """The gradients that travel together, as a compressor sees them: several parameters in one flat tensor.

    ``shapes`` are the parameters' shapes, ``dtype`` that of the flat tensor handed to the compressor, ``hierarchy`` is
    set if the exchange is to be dense inside nodes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device
    rank: int = 0
    world_size: int = 1
    hierarchy: Hierarchy | None = None

    @cached_property
    def numels(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @cached_property
    def numel(self) -> int:
        return sum(self.numels)

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """One 1-d view per parameter."""
        return list(flat.split(self.numels))

    def matrices(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """One (rows, columns) view per parameter: dimension 0 against all the others."""
        return [part.view(rows, -1) for part, (rows, _) in zip(self.split(flat), self.matrix_shapes, strict=True)]

    @cached_property
    def matrix_shapes(self) -> list[tuple[int, int]]:
        return [matrix_shape(shape) for shape in self.shapes]

    def seed(self, seed: int, step: int, *, per_rank: bool) -> int:
        """A 63-bit seed, another one each step and bucket; alike on all ranks unless ``per_rank``."""
        return hashed_seed((seed, step, self.names[0], self.rank if per_rank else None))

    def generator(self, seed: int, step: int, *, per_rank: bool) -> torch.Generator:
        """A private random generator with that seed."""
        return torch.Generator(self.device).manual_seed(self.seed(seed, step, per_rank=per_rank))

    def part(self, start: int, end: int, label: str) -> Bucket:
        """The stretch from ``start`` to ``end`` as a bucket of its own, of one 1-d parameter."""
        return replace(self, names=(f"{self.names[0]}[{label}]",), shapes=((end - start,),))


class StateTensor(NamedTuple):
    """A flat tensor kept between steps.

    Attributes:
        sizes: number of elements of each of the bucket's parameters.
        replicated: whether it is identical on all ranks. Otherwise each rank has its own, and their mean counts.
        is_residual: whether it is the part of this rank's gradients that has not been sent yet.
    """

    tensor: torch.Tensor
    sizes: Sequence[int]
    replicated: bool
    is_residual: bool = False


class State:
    """What a compressor remembers of one bucket: named tensors, and ``step``, the number of steps committed.

    Up to step ``dense_until`` the bucket is exchanged dense (``compression.repay``).

    Tensors are read as attributes (``state.residual``). A program never writes them: it returns their new values, which
    the reducer takes over once all ranks agree that the gradients are sound. They count from ``settle`` on, when the
    optimizer has stepped; ``revert`` takes them back. So a step that is skipped or dropped leaves no trace.
    """

    def __init__(self) -> None:
        self.step = self.dense_until = 0
        self.tensors: dict[str, StateTensor] = {}
        self._scratch: dict[str, torch.Tensor] = {}
        self._settled: dict[str, torch.Tensor] = {}  # as they were before this step, of what it has changed so far

    def add(
        self, name: str, tensor: torch.Tensor, sizes: Sequence[int], *, replicated: bool, is_residual: bool = False
    ) -> None:
        """Declare a tensor; see ``StateTensor`` for the arguments."""
        assert tensor.numel() == sum(sizes), (name, tensor.numel(), sum(sizes))
        self.tensors[name] = StateTensor(tensor, sizes, replicated, is_residual)

    def add_zeros(self, name: str, bucket: Bucket, *, is_residual: bool | None = None) -> None:
        """Declare a tensor of this rank's own, as large as the gradient, such as a residual or a momentum.

        By default it is a residual if it is called ``residual``.
        """
        zeros = torch.zeros(bucket.numel, dtype=bucket.dtype, device=bucket.device)
        is_residual = name == "residual" if is_residual is None else is_residual
        self.add(name, zeros, bucket.numels, replicated=False, is_residual=is_residual)

    @property
    def residuals(self) -> dict[str, torch.Tensor]:
        """The parts of this rank's gradients that have not been sent yet, by name."""
        return {name: declared.tensor for name, declared in self.tensors.items() if declared.is_residual}

    def __getattr__(self, name: str) -> torch.Tensor:
        tensors: dict[str, StateTensor] = self.__dict__.get("tensors", {})
        if name not in tensors:
            raise AttributeError(f"no state tensor {name!r}; declared are {list(tensors)}")
        return tensors[name].tensor

    def scratch(self, name: str) -> torch.Tensor:
        """A tensor like the named one, contents undefined, for a program to write the new value into and return.

        ``take`` then swaps the two in place of copying.
        """
        if name not in self._scratch:
            self._scratch[name] = torch.empty_like(self.tensors[name].tensor)
        return self._scratch[name]

    def take(self, new: Mapping[str, torch.Tensor], resting: Sequence[int] = ()) -> None:
        """Take over the values that a program returned, but for the parameters of the indices ``resting``."""
        for name, value in new.items():
            kept = self.tensors[name]
            flat = value.view(-1)
            _copy_parts(kept.tensor, flat, kept.sizes, resting)
            is_first = name not in self._settled
            if value is self._scratch.get(name):
                del self._scratch[name]
                self.tensors[name] = kept._replace(tensor=value)
                (self._settled if is_first else self._scratch)[name] = kept.tensor
            else:
                if is_first:
                    self._settled[name] = kept.tensor.clone()
                kept.tensor.copy_(flat)

    def settle(self) -> None:
        """What was taken over counts from now on: a step is done."""
        self._scratch |= self._settled
        self._settled = {}
        self.step += 1

    def revert(self, indices: Sequence[int] | None = None) -> None:
        """Take back what was taken over since ``settle``: all of it, or that of the parameters of these indices."""
        if indices is not None:
            for name, before in self._settled.items():
                _copy_parts(before, self.tensors[name].tensor, self.tensors[name].sizes, indices)
            return
        for name, before in self._settled.items():
            self._scratch[name] = self.tensors[name].tensor
            self.tensors[name] = self.tensors[name]._replace(tensor=before)
        self._settled = {}

    def commit(self, new: Mapping[str, torch.Tensor]) -> None:
        """``take`` and ``settle``."""
        self.take(new)
        self.settle()

    def slices(self, names: Sequence[str], *, is_settled: bool = True) -> Iterator[tuple[str, str, torch.Tensor, bool]]:
        """(parameter name, tensor name, view, replicated): keyed by parameter, so buckets may change between runs.

        They are of the last step that was settled, or what has been taken over since.
        """
        for name, declared in self.tensors.items():
            chosen = self._settled.get(name, declared.tensor) if is_settled else declared.tensor
            for parameter, view in zip(names, chosen.split(list(declared.sizes)), strict=True):
                yield parameter, name, view, declared.replicated


def _copy_parts(source: torch.Tensor, target: torch.Tensor, sizes: Sequence[int], indices: Sequence[int]) -> None:
    if indices:
        sources, targets = source.split(list(sizes)), target.split(list(sizes))
        for index in indices:
            targets[index].copy_(sources[index])


class Compressor(Section, ABC):
    """One algorithm of gradient exchange. Its fields are its hyper-parameters: config schema, command line and docs.

    A subclass with a ``name`` is registered under it.
    """

    name: ClassVar[str]
    bucket_mb: ClassVar[float] = 25.0
    """Gradient MiB that one bucket should hold. Compressed payloads are small: few rounds matter more than overlap."""
    is_lossless: ClassVar[bool] = False
    """Whether gradients are sent uncompressed."""
    sends_gradient_only: ClassVar[bool] = False
    """Whether the result is the mean of the gradients: nothing is left out, and no residual is added."""
    needs_float32: ClassVar[bool] = True
    """Whether half-precision gradients are handed over as float32 (float64 always stays as it is)."""

    hierarchical: bool = Field(
        default=False, description="dense inside a node, compressed between nodes; as many ranks on every node"
    )
    min_numel: int = Field(
        default=1024, ge=0, description="parameters of fewer elements, or of one dimension, travel dense"
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        name = cls.__dict__.get("name")
        if name is not None:
            assert name not in REGISTRY, f"two compressors are called {name!r}"
            REGISTRY[name] = cls

    def accepts(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of this shape is worth compressing. The others travel dense, fused."""
        return len(shape) >= 2 and math.prod(shape) >= self.min_numel

    def check(self, shapes: Sequence[Sequence[int]]) -> None:
        """Raise UserError if the options suit none of the parameters that were given to this compressor."""

    def init_state(self, bucket: Bucket) -> State:
        """The state before the first step."""
        return State()

    @abstractmethod
    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        """The program that turns this rank's gradient into the mean over ranks.

        Args:
            grad: (bucket.numel,), this rank's raw gradient in true units; the program may overwrite it.
            bucket: names and shapes of the parameters within ``grad``.
            state: what earlier steps left; only to be read.

        Yields:
            Collectives; it is sent their results.

        Returns:
            The mean, (bucket.numel,), bit-identical on all ranks, and the new values of the state's tensors.
        """


def dry_run(program: Program, bucket: Bucket) -> tuple[int, NewState]:
    """Run a program by hand as if all ranks sent what this one sends: the number of its collectives, its new state."""
    result: Any = None
    num_collectives = 0
    try:
        while True:
            match program.send(result):
                case AllReduce(tensor) | Broadcast(tensor):
                    result = tensor
                case AllGather(tensor):
                    result = list(torch.stack([tensor] * bucket.world_size))
                case AllToAll(chunks):
                    result = list(torch.stack([chunks[bucket.rank]] * bucket.world_size))
            num_collectives += 1
    except StopIteration as stop:
        _, new_state = stop.value
        return num_collectives, new_state


registry: Registry[Compressor] = Registry("compressor", Compressor, REGISTRY)  # type: ignore[type-abstract]


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def hashed_seed(key: Sequence[object]) -> int:
    """A hash of the key, 63 bits: the same on every host, run and Python version."""
    digest = hashlib.sha256(repr(tuple(key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seeded_generator(device: torch.device, key: Sequence[object]) -> torch.Generator:
    """A generator seeded by ``hashed_seed``."""
    return torch.Generator(device).manual_seed(hashed_seed(key))
