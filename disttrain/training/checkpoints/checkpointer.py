"""Saving and loading the state of a run.

The checkpointer knows the parts of a run by name, and nothing about the trainer that registers them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from disttrain.comm.collective_errors import collective_errors
from disttrain.errors import UserError
from disttrain.optim.averaging import BaseAverage
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.optim.model_buffers import ModelBuffers
from disttrain.training.checkpoints import contents
from disttrain.training.checkpoints.contents import Contents, load_buffers, load_errors, load_tensors
from disttrain.training.checkpoints.folder import StoredCheckpoint, prune
from disttrain.training.checkpoints.manifest import TENSOR_PARTS
from disttrain.training.checkpoints.writer import Writer
from disttrain.training.config import Config
from disttrain.training.run.directory import RunDirectory

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """A part of a run that checkpoints hold, as in ``torch.distributed.checkpoint``.

    A state is a mapping of JSON values, the same on all ranks. The parts named in ``TENSOR_PARTS`` have tensors as
    well: their state is ``{"values": JSON, "tensors": {name: tensor}}``, also the same on all ranks.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state. May be a collective."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Load a state. Not a collective."""
        ...


class Checkpointer:
    """Saves the model, the optimizer and the registered parts of a run, and resumes from what it has saved.

    Args:
        config: of the run.
        directory: of the run.
        optimizer: of the model that is saved.
        buffers: of the model.

    Attributes:
        latest: path of the checkpoint that was started last, or None.
    """

    def __init__(
        self, config: Config, directory: RunDirectory, optimizer: DistributedOptimizer, buffers: ModelBuffers
    ) -> None:
        self._config, self._section, self._directory = config, config.checkpoint, directory
        self._optimizer, self._buffers, self._comm = optimizer, buffers, optimizer.comm
        self._parts: dict[str, Stateful] = {}
        self._writer = Writer(self._comm, self._section.in_flight)
        self._seconds: dict[str, float] = {}
        self.latest: Path | None = None

    def register(self, **parts: Stateful) -> None:
        """Save and load these parts too. They are loaded in order of registration, after model and optimizer.

        The state of ``progress`` forms the top level of the manifest's "progress"; those of other parts are below it.
        """
        self._parts |= parts

    def resume(self, checkpoint: StoredCheckpoint, skip: Collection[str] = ()) -> bool:
        """Load a checkpoint. A collective.

        Args:
            checkpoint: with the state.
            skip: names of parts to leave as they are.

        Returns:
            Whether each rank's own buffers and random generators were restored, which needs the same number of ranks.
            If not, the caller has to seed the generators.

        Raises:
            UserError: the checkpoint does not fit the run, on all ranks.
        """
        path, manifest = checkpoint
        is_restored = contents.load(path, manifest, self._comm, self._optimizer.model, self._optimizer)
        with collective_errors(self._comm), load_errors(path):
            for name, part in self._parts.items():
                if name not in skip:
                    part.load_state_dict(_state_of(name, checkpoint))
            if is_restored:
                self._buffers.load(load_buffers(path, self._comm.rank))
        return is_restored

    def save(self, step: int, metrics: Mapping[str, float]) -> None:
        """Copy the current state, and write it as a checkpoint while training continues. A collective.

        Args:
            step: optimizer steps done.
            metrics: of an evaluation at this step; empty if there was none.

        Raises:
            UserError: an earlier checkpoint could not be written, on all ranks; unless ``on_error`` is "continue".
        """
        started = time.perf_counter()
        self.wait(self._section.in_flight - 1)
        waited = time.perf_counter()
        with self._buffers.synchronized() as own_buffers:
            self._start_writing(step, metrics, own_buffers)
        if not self._section.background:
            self.wait()
        self._add_seconds("checkpoint_wait_seconds", waited - started)
        self._add_seconds("checkpoint_seconds", time.perf_counter() - started)

    def _start_writing(self, step: int, metrics: Mapping[str, float], own_buffers: Mapping[str, torch.Tensor]) -> None:
        """Copy the state while all ranks have the same buffers."""
        progress, tensors = self._collect_parts()
        collected = Contents.collect(
            self._comm,
            self._optimizer.model,
            self._optimizer,
            tensors,
            buffers=own_buffers,
            flush=self._section.residuals == "flush",
        )
        facts = {
            "run": self._directory.run,
            "step": step,
            "progress": progress,
            "config": self._config.to_dict(),
            "metrics": dict(metrics),
        }
        folder, attempt = self._directory.checkpoints, self._directory.attempt
        self.latest = self._writer.start(folder, attempt, collected, facts, on_complete=self._prune)

    def _collect_parts(self) -> tuple[dict[str, Any], dict[str, Mapping[str, torch.Tensor]]]:
        """Return the manifest's "progress", and the tensors of each part in ``TENSOR_PARTS``."""
        progress: dict[str, Any] = {}
        values: dict[str, Any] = {}
        tensors: dict[str, Mapping[str, torch.Tensor]] = {}
        for name, part in self._parts.items():
            state = part.state_dict()
            if name == "progress":
                progress |= state
            elif name in TENSOR_PARTS:
                values[name], tensors[name] = state["values"], state["tensors"]
            else:
                progress[name] = state
        return {**progress, "parts": values}, tensors

    def wait(self, max_in_flight: int = 0, *, is_end: bool = False) -> None:
        """Wait until no more than ``max_in_flight`` checkpoints are being written. A collective.

        Raises:
            UserError: one could not be written, on all ranks; unless ``on_error`` is "continue". At the end of a run,
                always if the last one could not be written.
        """
        while self._writer.num_in_flight > max_in_flight:
            try:
                self._writer.wait_for_oldest()
            except UserError as error:  # noqa: PERF203 - a handful of iterations
                if self._section.on_error == "stop" or (is_end and not self._writer.num_in_flight):
                    raise
                logger.warning("the run continues without a checkpoint: %s", error)

    def pop_metrics(self) -> dict[str, float]:
        """Return the seconds that training has spent on checkpoints since the last call; empty if none was saved."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def close(self) -> None:
        """Wait until pending checkpoints are on disk, without the other ranks."""
        self._writer.close()

    def _prune(self) -> None:
        prune(self._directory.checkpoints, self._section.keep, self._section.keep_best)

    def _add_seconds(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


def _state_of(name: str, checkpoint: StoredCheckpoint) -> Mapping[str, Any]:
    """Return the saved state of a part; an empty one if an older version has saved none."""
    path, manifest = checkpoint
    if name in TENSOR_PARTS:
        values = manifest.progress.get("parts", {}).get(name)
        return {"values": values, "tensors": load_tensors(path, manifest, name)}
    state = manifest.progress if name == "progress" else manifest.progress.get(name, {})
    if not isinstance(state, Mapping):
        raise TypeError(f"{name} should be a mapping, and is a {type(state).__name__}")
    return state


class AverageState:
    """The state of a weight average in the form that ``Checkpointer.register`` takes."""

    def __init__(self, average: BaseAverage) -> None:
        self._average = average

    def state_dict(self) -> dict[str, Any]:
        return {"values": self._average.num_steps, "tensors": self._average.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._average.load_state_dict(state["tensors"], state["values"] or 0)
