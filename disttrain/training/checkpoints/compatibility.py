"""Whether a run can be resumed from a checkpoint under its config, and what changes when it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from disttrain.batching import AdaScale
from disttrain.errors import UserError
from disttrain.training.checkpoints.folder import StoredCheckpoint
from disttrain.training.checkpoints.manifest import Manifest
from disttrain.training.config import Config
from disttrain.training.run.progress import Progress


def check_fits(checkpoint: StoredCheckpoint, config: Config, num_samples: int) -> None:
    """Check that the config and the data give the checkpoint's optimizer state and position the same meaning.

    Args:
        checkpoint: to resume from.
        config: of the run.
        num_samples: samples in an epoch of the run's data.

    Raises:
        UserError: they do not.
        ValueError, LookupError, TypeError, AttributeError: the manifest is malformed.
    """
    path, manifest = checkpoint
    if Progress.parse(manifest.progress).step != manifest.step:
        raise ValueError("its progress is that of another step")
    saved, old = manifest.progress, manifest.config
    optimizer = config.to_dict()["optimizer"]
    for key in ("name", "momentum_correction"):  # what the optimizer's state means depends on these
        was, now = old["optimizer"].get(key), optimizer.get(key)
        if was != now:
            raise UserError(
                f"optimizer.{key}={now!r}, but checkpoint {str(path)!r} was saved with {was!r}: set it to that"
            )
    _check_base(path, saved, old.get("batch", {}), config, num_samples)
    order = (old["seed"], saved["num_samples"])
    if saved["offset"] and order != (config.seed, num_samples):
        raise UserError(
            f"checkpoint {str(path)!r} was saved in the middle of an epoch with seed={order[0]} and {order[1]} "
            f"samples, and now there are seed={config.seed} and {num_samples} samples: use the same, or resume from "
            "the end of an epoch"
        )


def _check_base(path: Path, saved: dict[str, Any], batch: dict[str, Any], config: Config, num_samples: int) -> None:
    """Raise UserError if AdaScale's steps, which measure the length of its runs, have changed their meaning."""
    was = batch.get("base_batch_size")  # other policies have none
    now = config.batch.base_batch_size if isinstance(config.batch, AdaScale) else None
    if was != now:
        advice = (
            "use batch.name=adascale only from the start of a run"
            if was is None
            else f"set batch.name=adascale and batch.base_batch_size={was}"
        )
        raise UserError(
            f"batch.base_batch_size={now}, but checkpoint {str(path)!r} was saved with {was}, and AdaScale measures a "
            f"run in steps of that batch: {advice}"
        )
    if now is not None and config.epochs is not None and saved["num_samples"] != num_samples:
        raise UserError(
            f"checkpoint {str(path)!r} has counted epochs of {saved['num_samples']} samples in AdaScale's base batch, "
            f"and now there are {num_samples}: use the same data, or limit the run by max_steps alone, with epochs=null"
        )


def is_same_batch_policy(manifest: Manifest, config: Config) -> bool:
    """Whether the state of the checkpoint's batch policy is of use to the config's."""
    return bool(manifest.config.get("batch", {}).get("name") == config.to_dict()["batch"]["name"])


def changes_since(manifest: Manifest, world_size: int, batch_size: int) -> Iterator[str]:
    """Yield a message for each setting that has changed since the checkpoint was saved."""
    was = manifest.progress.get("batch", {}).get("batch_size", batch_size)
    if batch_size != was:
        yield f"a batch of {batch_size} instead of {was}: schedules continue at the same fraction of the run"
    if world_size != manifest.world_size:
        yield (
            f"{world_size} workers instead of {manifest.world_size}: a batch of {batch_size} is now "
            f"{batch_size / world_size:g} samples per worker, was {was / manifest.world_size:g}; every worker gets the "
            "mean of all residuals; random generators are seeded again"
        )
