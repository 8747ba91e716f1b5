"""The interface of compressors: an algorithm is a generator in which every ``yield`` is one collective.

A compressor does no I/O. The reducer runs it over real engines, the simulator runs N of them in one process, and a test
can run one step by step.
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
from disttrain.kernels import Feedback, Units
from disttrain.validation import Registry, Section

NewState: TypeAlias = dict[str, torch.Tensor]
Program: TypeAlias = Generator[Collective, Any, tuple[torch.Tensor, NewState]]
Shapes: TypeAlias = tuple[tuple[int, ...], ...]

REGISTRY: dict[str, type[Compressor]] = {}


@dataclass(frozen=True)
class Hierarchy:
    """This rank's place in its node, and among the ranks with its place on all nodes. Nodes have the same size."""

    node_rank: int
    node_size: int
    across_rank: int
    num_nodes: int


@dataclass(frozen=True)
class Bucket:
    """The gradients that are exchanged together, as a compressor sees them: several parameters in one flat tensor.

    Attributes:
        shapes: shapes of the parameters.
        dtype: of the flat tensor that the compressor gets.
        hierarchy: set if the exchange is dense inside nodes.
    """

    names: tuple[str, ...]
    shapes: Shapes
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
        """Return one 1-d view per parameter."""
        return list(flat.split(self.numels))

    def matrices(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return one (rows, columns) view per parameter: dimension 0 against all the others."""
        return [part.view(rows, -1) for part, (rows, _) in zip(self.split(flat), self.matrix_shapes, strict=True)]

    @cached_property
    def matrix_shapes(self) -> list[tuple[int, int]]:
        return [matrix_shape(shape) for shape in self.shapes]

    def seed(self, seed: int, step: int, *, per_rank: bool) -> int:
        """Return a 63-bit seed that differs by step and bucket, and by rank if ``per_rank``."""
        return hashed_seed((seed, step, self.names[0], self.rank if per_rank else None))

    def generator(self, seed: int, step: int, *, per_rank: bool) -> torch.Generator:
        """Return a private random generator with that seed."""
        return torch.Generator(self.device).manual_seed(self.seed(seed, step, per_rank=per_rank))

    def part(self, start: int, end: int, label: str) -> Bucket:
        """Return the elements from ``start`` to ``end`` as a bucket of one 1-d parameter."""
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
    """What a compressor remembers of one bucket: named tensors, and ``step``, the number of committed steps.

    Tensors are read as attributes (``state.residual``). A program never writes them. It returns their new values, often
    written to ``scratch`` buffers, and the reducer takes these through the following life cycle:

    * ``stage`` makes them current, once all ranks agree that the gradients are finite. The old values are kept.
    * ``commit`` makes them final, when the optimizer has stepped on the result.
    * ``rollback`` restores the old values, if the optimizer skips or drops the step.

    So a step that is not taken leaves no trace.

    Attributes:
        dense_until: step up to which the bucket is exchanged dense (``compression.flush``).
        units: of the residuals in this step, for a compressor that converts gradients by itself.
    """

    def __init__(self) -> None:
        self.step = self.dense_until = 0
        self.units: Units | None = None
        self.tensors: dict[str, StateTensor] = {}
        self._scratch: dict[str, torch.Tensor] = {}
        self._committed: dict[str, torch.Tensor] = {}  # the old values of tensors that are staged

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

    def __getattr__(self, name: str) -> torch.Tensor:
        tensors: dict[str, StateTensor] = self.__dict__.get("tensors", {})
        if name not in tensors:
            raise AttributeError(f"no state tensor {name!r}; declared are {list(tensors)}")
        return tensors[name].tensor

    @property
    def residuals(self) -> dict[str, torch.Tensor]:
        """The parts of this rank's gradients that have not been sent yet, by name."""
        return {name: declared.tensor for name, declared in self.tensors.items() if declared.is_residual}

    def scratch(self, name: str) -> torch.Tensor:
        """Return a buffer like the named tensor, contents undefined, into which a program may write the new value.

        ``stage`` then swaps the two instead of copying.
        """
        if name not in self._scratch:
            self._scratch[name] = torch.empty_like(self.tensors[name].tensor)
        return self._scratch[name]

    def feedback(self, name: str) -> Feedback:
        """Error feedback with the named residual: a kernel reads it, and writes the new one to its scratch buffer."""
        return Feedback(self.tensors[name].tensor, self.scratch(name))

    def stage(self, new: Mapping[str, torch.Tensor], unused: Sequence[int] = ()) -> None:
        """Make the values that a program returned current, except for the parameters with the indices ``unused``."""
        for name, value in new.items():
            declared = self.tensors[name]
            flat = value.view(-1)
            _copy_parameters(declared.tensor, flat, declared.sizes, unused)
            is_first = name not in self._committed
            if value is self._scratch.get(name):
                del self._scratch[name]
                self.tensors[name] = declared._replace(tensor=value)
                (self._committed if is_first else self._scratch)[name] = declared.tensor
            else:
                if is_first:
                    self._committed[name] = declared.tensor.clone()
                declared.tensor.copy_(flat)

    def commit(self, new: Mapping[str, torch.Tensor] | None = None) -> None:
        """End a step: make staged values final, after staging ``new`` if given."""
        if new is not None:
            self.stage(new)
        self._scratch |= self._committed
        self._committed = {}
        self.step += 1

    def rollback(self, indices: Sequence[int] | None = None) -> None:
        """Restore the committed values, of all parameters or only of those with these indices."""
        if indices is not None:
            for name, before in self._committed.items():
                _copy_parameters(before, self.tensors[name].tensor, self.tensors[name].sizes, indices)
            return
        for name, before in self._committed.items():
            self._scratch[name] = self.tensors[name].tensor
            self.tensors[name] = self.tensors[name]._replace(tensor=before)
        self._committed = {}

    def slices(
        self, names: Sequence[str], *, is_committed: bool = True
    ) -> Iterator[tuple[str, str, torch.Tensor, bool]]:
        """Yield (parameter name, tensor name, view, replicated) of the committed values, or of the current ones.

        Values are keyed by parameter, so that buckets may change between runs.
        """
        for name, declared in self.tensors.items():
            tensor = self._committed.get(name, declared.tensor) if is_committed else declared.tensor
            for parameter, view in zip(names, tensor.split(list(declared.sizes)), strict=True):
                yield parameter, name, view, declared.replicated


def _copy_parameters(source: torch.Tensor, target: torch.Tensor, sizes: Sequence[int], indices: Sequence[int]) -> None:
    """Copy the elements of the parameters with these indices."""
    if indices:
        sources, targets = source.split(list(sizes)), target.split(list(sizes))
        for index in indices:
            targets[index].copy_(sources[index])


class Compressor(Section, ABC):
    """A gradient exchange algorithm. Its fields are its hyper-parameters, from which config schema and docs are made.

    A subclass with a ``name`` is registered under it.
    """

    name: ClassVar[str]
    bucket_mb: ClassVar[float] = 25.0
    """MiB of gradients in a bucket. Payloads are small, so few rounds matter more than overlap."""
    is_lossless: ClassVar[bool] = False
    """Whether gradients are sent uncompressed."""
    sends_gradient_only: ClassVar[bool] = False
    """Whether the result is the mean of the gradients: nothing is left out, and no residual is added."""
    needs_float32: ClassVar[bool] = True
    """Whether half-precision gradients are converted to float32 (float64 always stays as it is)."""

    hierarchical: bool = Field(
        default=False, description="dense inside a node, compressed between nodes; as many ranks on every node"
    )
    min_numel: int = Field(
        default=1024, ge=0, description="parameters of fewer elements, or of one dimension, are sent dense"
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        name = cls.__dict__.get("name")
        if name is not None:
            assert name not in REGISTRY, f"two compressors are called {name!r}"
            REGISTRY[name] = cls

    def accepts(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of this shape is worth compressing. All others are sent dense, fused."""
        return len(shape) >= 2 and math.prod(shape) >= self.min_numel

    def converts_units(self) -> bool:
        """Whether ``reduce`` converts gradients to ``state.units``, if these are set, and their mean back.

        For compressors that are faster so.
        """
        return False

    def check(self, shapes: Sequence[Sequence[int]]) -> None:
        """Raise UserError if the options suit none of the parameters assigned to this compressor."""

    def init_state(self, bucket: Bucket) -> State:
        """Return the state before the first step."""
        return State()

    def num_rounds(self, bucket: Bucket) -> int:
        """Return the number of collectives that ``reduce`` yields for this bucket; the same in each step.

        Override it. A hierarchical exchange has to know it, and this fallback runs the program on zeros to find out.
        """
        zeros = torch.zeros(bucket.numel, dtype=bucket.dtype, device=bucket.device)
        return dry_run(self.reduce(zeros, bucket, self.init_state(bucket)), bucket)[0]

    @abstractmethod
    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        """Turn this rank's gradient into the mean over ranks.

        Args:
            grad: (bucket.numel,), this rank's unscaled gradient; the program may overwrite it.
            bucket: names and shapes of the parameters in ``grad``.
            state: what earlier steps left; read-only.

        Yields:
            Collectives. The program is sent their results.

        Returns:
            The mean, (bucket.numel,), bit-identical on all ranks, and new values of the state's tensors.
        """


def dry_run(program: Program, bucket: Bucket) -> tuple[int, NewState]:
    """Run a program as if all ranks sent what this one sends; return the number of collectives and the new state."""
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
    """Return (rows, columns) of a parameter as a matrix: dimension 0 against all the others."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def hashed_seed(key: Sequence[object]) -> int:
    """Return a 63-bit hash of the key: the same on every host, in every run and Python version."""
    digest = hashlib.sha256(repr(tuple(key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seeded_generator(device: torch.device, key: Sequence[object]) -> torch.Generator:
    """Return a generator seeded by ``hashed_seed``."""
    return torch.Generator(device).manual_seed(hashed_seed(key))
