"""Saving a run, and going on with one: what of the trainer's a checkpoint holds, and what must be as it was."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disttrain.training import checkpoint
from disttrain.training.agreement import AgreedError, agreement
from disttrain.training.config import Config
from disttrain.training.progress import Progress, bytes_of_a_worker
from disttrain.training.random_state import seed_everything
from disttrain.training.run_directory import RunDirectory, open_run

if TYPE_CHECKING:
    from disttrain.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Saving:
    """A run's directory and checkpoints. Making it goes on from a checkpoint, if the config says so and there is one.

    Attributes:
        skipped_before: steps skipped before the run was resumed.

    Raises:
        UserError: the config does not fit the checkpoint; the same on all ranks.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._config, self._comm = trainer, trainer.config, trainer.comm
        self._run = self._open_run()
        self.skipped_before, self._wire_before = trainer.progress.skipped_steps, trainer.progress.wire

    def save(self) -> None:
        """Write a checkpoint of this very moment. The ranks' buffers must be alike."""
        trainer = self._trainer
        checkpoint.save(
            self._config.directory / "checkpoints",
            self._comm,
            trainer.model,
            trainer.optimizer,
            step=trainer.progress.step,
            progress={
                **asdict(trainer.progress),
                "wire": self.wire(),
                "learning_rate": {**trainer.learning_rate.state_dict(), **trainer.plateau.state_dict()},
                "batch": trainer.batch.state_dict(),
                "num_samples": trainer.sampler.num_samples,
                "parts": {"average": trainer.average.num_steps, "best": trainer.stopper.state_dict()},
            },
            config=self._config.to_dict(),
            keep=self._config.checkpoint.keep,
            parts={"average": trainer.average.state_dict(), "best": trainer.stopper.best_weights},
        )

    def wire(self) -> dict[str, Any]:
        """Bytes of an average worker since the run began. A collective."""
        return bytes_of_a_worker(self._trainer.optimizer.wire, self._wire_before)

    def close(self) -> None:
        """Release the run's directory."""
        if self._run is not None:
            self._run.lock.close()

    def _open_run(self) -> RunDirectory | None:
        """Open the run's directory, on rank 0, and go on from the checkpoint that the config asks for."""
        run, comm, config, trainer = None, self._comm, self._config, self._trainer
        start_from = config.start_from
        if start_from is not None and config.resume == "never":  # before an earlier run of this name is set aside
            start_from.load(trainer.model, comm)
        with agreement(comm):
            if comm.rank == 0:
                run = open_run(config)
        found = run and run.resumed and [str(run.resumed.path), run.resumed.manifest]
        found = comm.broadcast_object(found)
        if found is None and start_from is not None and config.resume != "never":
            start_from.load(trainer.model, comm)
        elif found is not None and start_from is not None:
            logger.info("start_from is not used: the run goes on from %s", found[0])
        restored = found is not None and self._resume(Path(found[0]), found[1])
        if not restored:  # unlike on each rank: dropout should differ
            seed_everything(config.seed, comm.rank, trainer.progress.step)
        return run

    def _resume(self, path: Path, manifest: dict[str, Any]) -> bool:
        """Take over a checkpoint; whether that restored the random generators."""
        trainer, sampler, batch = self._trainer, self._trainer.sampler, self._trainer.batch
        saved, old = dict(manifest["progress"]), manifest["config"]
        saved.pop("num_samples")
        parts = saved.pop("parts", {"average": 0, "best": {}})
        check_fits(path, manifest, self._config, sampler.num_samples)
        trainer.thawing.reach(saved["step"] - 1)
        restored = checkpoint.load(path, manifest, self._comm, trainer.model, trainer.optimizer)
        with agreement(self._comm):
            trainer.average.load_state_dict(checkpoint.load_part(path, manifest, "average"), parts["average"])
            trainer.stopper.load_state_dict(parts["best"], checkpoint.load_part(path, manifest, "best"))
        trainer.progress = progress = Progress(**saved)
        trainer.learning_rate.load_state_dict(progress.learning_rate)
        trainer.plateau.load_state_dict(progress.learning_rate)
        sampler.epoch, sampler.offset = progress.epoch, progress.offset
        if old.get("batch", {}).get("name") == self._config.to_dict()["batch"]["name"]:
            batch.load_state_dict(progress.batch)
            sampler.resize(batch.batch_size, batch.accumulation)
            progress.epoch, progress.offset = sampler.epoch, sampler.offset
        return restored


def check_fits(path: Path, manifest: Mapping[str, Any], config: Config, num_samples: int) -> None:
    """Raise AgreedError if the checkpoint's optimizer is another, or its place in an epoch is not the same now."""
    saved, old = manifest["progress"], manifest["config"]
    optimizer = config.to_dict()["optimizer"]
    for key in ("name", "momentum_correction"):  # what the optimizer's state means
        was, now = old["optimizer"].get(key), optimizer.get(key)
        if was != now:
            message = f"optimizer.{key}={now!r}, but checkpoint {str(path)!r} was made with {was!r}: keep that"
            raise AgreedError(message)
    order = (old["seed"], saved["num_samples"])
    if saved["offset"] and order != (config.seed, num_samples):
        raise AgreedError(
            f"checkpoint {str(path)!r} lies within an epoch of seed={order[0]} and {order[1]} samples, now it is "
            f"{config.seed} and {num_samples}: keep them, or resume from an epoch's end"
        )
