"""Saving a run, and going on with one: what of the trainer's a checkpoint holds, and what must be as it was."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter

from disttrain.batching import AdaScale
from disttrain.comm.collective_errors import collective_errors
from disttrain.errors import UserError
from disttrain.training.checkpoints import contents as checkpoint
from disttrain.training.checkpoints.folder import prune
from disttrain.training.checkpoints.manifest import Manifest
from disttrain.training.checkpoints.writer import Writer
from disttrain.training.config import Config
from disttrain.training.run import launches as elastic
from disttrain.training.run.directory import RunDirectory, check_shared, open_run
from disttrain.training.run.progress import Progress, bytes_of_a_worker
from disttrain.training.run.random_state import seed_everything

if TYPE_CHECKING:
    from disttrain.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Checkpointer:
    """A run's directory and checkpoints. Making it goes on from a checkpoint, if the config says so and there is one.

    Attributes:
        skipped_before: steps skipped before the run was resumed.
        latest: the checkpoint that was taken last, or None.

    Raises:
        UserError: the config does not fit the checkpoint; the same on all ranks.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._config, self._comm = trainer, trainer.config, trainer.comm
        self._section = trainer.config.checkpoint
        self._folder = trainer.config.directory / "checkpoints"
        self._directory: RunDirectory | None = None
        self._run, self._attempt = self._open_run()
        self.skipped_before, self._wire_before = trainer.progress.skipped_steps, trainer.progress.wire
        self._writer = Writer(self._comm, self._section.in_flight)
        self._seconds: dict[str, float] = {}
        self.latest: Path | None = None

    def save(self, metrics: Mapping[str, float]) -> None:
        """Take a checkpoint of this very moment, to be written while training goes on. A collective.

        ``metrics`` are of an evaluation at this step; none if there was none.

        Raises:
            UserError: an earlier one could not be written, on all ranks; unless the config says to go on.
        """
        began = time.perf_counter()
        self.settle(self._section.in_flight - 1)
        settled = time.perf_counter()
        with self._trainer.buffers.synchronized() as own:
            self._take(metrics, own)
        if not self._section.background:
            self.settle()
        self._note("checkpoint_wait_seconds", settled - began)
        self._note("checkpoint_seconds", time.perf_counter() - began)

    def _take(self, metrics: Mapping[str, float], buffers: Mapping[str, torch.Tensor]) -> None:
        """Copy all there is, the ranks' buffers being alike; ``buffers`` are this rank's own."""
        trainer = self._trainer
        parts = {"average": trainer.average.state_dict(), "best": trainer.stopper.best_weights}
        contents = checkpoint.Contents.of(
            self._comm,
            trainer.model,
            trainer.optimizer,
            parts,
            buffers=buffers,
            flush=self._section.residuals == "flush",
        )
        facts = {
            "run": self._run,
            "step": trainer.progress.step,
            "progress": {
                **asdict(trainer.progress),
                "wire": self.wire(),
                "learning_rate": {**trainer.learning_rate.state_dict(), **trainer.plateau.state_dict()},
                "batch": trainer.batch.state_dict(),
                "health": trainer.health.state_dict(),
                "num_samples": trainer.sampler.num_samples,
                "parts": {"average": trainer.average.num_steps, "best": trainer.stopper.state_dict()},
            },
            "config": self._config.to_dict(),
            "metrics": dict(metrics),
        }
        self.latest = self._writer.take(self._folder, self._attempt, contents, facts, keep=self._prune)

    def settle(self, leave: int = 0, *, is_end: bool = False) -> None:
        """Wait until all but ``leave`` checkpoints are on the disk, or have failed. A collective.

        Raises:
            UserError: one has failed, on all ranks; unless the config says to go on. At the end of a run, if the last
                one has failed, whatever the config says.
        """
        while self._writer.num_in_flight > leave:
            try:
                self._writer.settle()
            except UserError as error:  # noqa: PERF203 - a handful of them
                if self._section.on_error == "stop" or (is_end and not self._writer.num_in_flight):
                    raise
                logger.warning("the run goes on without a checkpoint: %s", error)

    def take_metrics(self) -> dict[str, float]:
        """Seconds that training has waited for checkpoints since this was last called; empty if there was none."""
        taken, self._seconds = self._seconds, {}
        return taken

    def _prune(self) -> None:
        prune(self._folder, self._section.keep, self._section.keep_best)

    def wire(self) -> dict[str, Any]:
        """Bytes of an average worker since the run began. A collective."""
        return bytes_of_a_worker(self._trainer.optimizer.wire, self._wire_before)

    def close(self) -> None:
        """Let what is on its way reach the disk, and release the run's directory."""
        self._writer.close()
        if self._directory is not None:
            self._directory.lock.close()

    def _note(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _open_run(self) -> tuple[str, str]:
        """Open the run's directory, on rank 0, and go on from the checkpoint that the config asks for.

        Returns:
            The identities of the run and of this attempt at it.
        """
        comm, config, trainer = self._comm, self._config, self._trainer
        start_from = config.start_from
        if start_from is not None and config.resume == "never":  # before an earlier run of this name is set aside
            start_from.load(trainer.model, comm)
        launches, opened = elastic.launches(comm), None
        with collective_errors(comm):
            if comm.rank == 0:
                self._directory = directory = open_run(config, launches)
                found = directory.resumed and [str(directory.resumed.path), directory.resumed.manifest.model_dump()]
                opened = [directory.run, directory.attempt, found]
        run, attempt, found = comm.broadcast_object(opened)
        if self._section.enabled:
            with collective_errors(comm):
                check_shared(config.directory, attempt)
        if found is None and start_from is not None and config.resume != "never":
            start_from.load(trainer.model, comm)
        elif found is not None and start_from is not None:
            logger.info("start_from is not used: the run goes on from %s", found[0])
        restored = found is not None and self._resume(Path(found[0]), Manifest.model_validate(found[1]))
        if not restored:  # unlike on each rank: dropout should differ
            seed_everything(config.seed, comm.rank, trainer.progress.step)
        return run, attempt

    def _resume(self, path: Path, manifest: Manifest) -> bool:
        """Take over a checkpoint; whether that restored the random generators."""
        trainer, comm = self._trainer, self._comm
        with collective_errors(comm), checkpoint.damage(path):
            saved, parts = _progress_of(manifest)
            check_fits(path, manifest, self._config, trainer.sampler.num_samples)
        trainer.unfreezing.unfreeze_due(saved.step - 1)
        restored = checkpoint.load(path, manifest, comm, trainer.model, trainer.optimizer)
        with collective_errors(comm), checkpoint.damage(path):
            trainer.average.load_state_dict(checkpoint.load_part(path, manifest, "average"), parts["average"])
            trainer.stopper.load_state_dict(parts["best"], checkpoint.load_part(path, manifest, "best"))
            if restored:
                trainer.buffers.load(checkpoint.load_buffers(path, comm.rank))
            self._take_over(saved, manifest)
        logger.info("going on from %s: step %d, %.2f epochs", path, saved.step, trainer.epochs)
        for change in self._changes(manifest):
            logger.info("%s", change)
        return restored

    def _take_over(self, saved: Progress, manifest: Manifest) -> None:
        trainer, sampler, batch = self._trainer, self._trainer.sampler, self._trainer.batch
        trainer.progress = saved
        trainer.learning_rate.load_state_dict(saved.learning_rate)
        trainer.plateau.load_state_dict(saved.learning_rate)
        trainer.health.load_state_dict(saved.health)
        sampler.epoch, sampler.offset = saved.epoch, saved.offset
        if manifest.config.get("batch", {}).get("name") == self._config.to_dict()["batch"]["name"]:
            batch.load_state_dict(saved.batch)
        batch.resume(saved.step, sampler.epoch + sampler.offset / sampler.num_samples)
        sampler.resize(batch.batch_size, batch.accumulation)
        saved.epoch, saved.offset = sampler.epoch, sampler.offset

    def _changes(self, manifest: Manifest) -> Iterator[str]:
        """What is not as it was, for the user to know."""
        new, old, batch = self._comm.world_size, manifest.world_size, self._trainer.batch.batch_size
        was = manifest.progress.get("batch", {}).get("batch_size", batch)
        if batch != was:
            yield f"a batch of {batch} in place of {was}: schedules go on at the same part of the run"
        if new != old:
            yield (
                f"{new} workers in place of {old}: a batch of {batch} is now {batch / new:g} samples a worker, was "
                f"{was / old:g}; every worker gets the mean of what all had still to send; random generators begin anew"
            )


def _progress_of(manifest: Manifest) -> tuple[Progress, dict[str, Any]]:
    """How far the run had come, and what is said there of further files.

    Raises:
        ValueError: the manifest does not say it.
    """
    progress = TypeAdapter(Progress).validate_python(manifest.progress)
    if progress.step != manifest.step or min(progress.epoch, progress.offset, progress.samples) < 0:
        raise ValueError("its progress contradicts itself")
    return progress, manifest.progress.get("parts", {"average": 0, "best": {}})


def check_fits(path: Path, manifest: Manifest, config: Config, num_samples: int) -> None:
    """Raise UserError if the checkpoint's optimizer is another, or its place in the run is not the same now."""
    saved, old = manifest.progress, manifest.config
    optimizer = config.to_dict()["optimizer"]
    for key in ("name", "momentum_correction"):  # what the optimizer's state means
        was, now = old["optimizer"].get(key), optimizer.get(key)
        if was != now:
            message = f"optimizer.{key}={now!r}, but checkpoint {str(path)!r} was made with {was!r}: keep that"
            raise UserError(message)
    _check_base(path, saved, old.get("batch", {}), config, num_samples)
    order = (old["seed"], saved["num_samples"])
    if saved["offset"] and order != (config.seed, num_samples):
        raise UserError(
            f"checkpoint {str(path)!r} lies within an epoch of seed={order[0]} and {order[1]} samples, now it is "
            f"{config.seed} and {num_samples}: keep them, or resume from an epoch's end"
        )


def _check_base(path: Path, saved: dict[str, Any], batch: dict[str, Any], config: Config, num_samples: int) -> None:
    """Raise UserError if AdaScale's steps, in which it counts how far a run has come, do not mean what they did."""
    was = batch.get("base_batch_size")  # no other policy has any
    now = config.batch.base_batch_size if isinstance(config.batch, AdaScale) else None
    if was != now:
        wanted = (
            "batch.name=adascale only if the run begins with it" if was is None else f"batch.name=adascale and {was}"
        )
        raise UserError(
            f"batch.base_batch_size={now}, but checkpoint {str(path)!r} was made with {was}, and AdaScale counts a run "
            f"in steps of that batch: set {wanted}"
        )
    if now is not None and config.epochs is not None and saved["num_samples"] != num_samples:
        raise UserError(
            f"checkpoint {str(path)!r} has counted epochs of {saved['num_samples']} samples in AdaScale's base "
            f"batch, now there are {num_samples}: keep them, or bound the run by max_steps alone, with epochs=null"
        )
