"""The folder of a run's checkpoints: finding, completing and deleting them."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from disttrain.errors import UserError
from disttrain.training.checkpoints import manifest as checkpoint_manifest
from disttrain.training.checkpoints.manifest import Manifest
from disttrain.validation import Section

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{1,15})", re.ASCII)


class Best(Section):
    """Which checkpoint is the best. Only evaluations at the very step of a checkpoint count."""

    metric: str = Field(description="the held-out metric, as the task names it: accuracy, bits_per_byte, loss")
    mode: Literal["min", "max"] = Field(description="whether smaller or larger values are better")

    def select(self, manifests: Sequence[Manifest]) -> Manifest | None:
        """Return the best one, the earliest of equally good ones; None if none was evaluated."""
        sign = 1.0 if self.mode == "min" else -1.0
        rated = [(sign * value, one.step, one) for one in manifests if (value := self._value(one)) is not None]
        return min(rated, key=lambda entry: entry[:2])[2] if rated else None

    def _value(self, manifest: Manifest) -> float | None:
        value = manifest.metrics.get(self.metric)
        return value if value is not None and math.isfinite(value) else None


class StoredCheckpoint(NamedTuple):
    """A checkpoint on disk."""

    path: Path
    manifest: Manifest


def newest(folder: Path) -> StoredCheckpoint | None:
    """Return the newest complete checkpoint in a folder, or None. Log a warning about each broken one on the way."""
    for path in reversed(checkpoints_in(folder)):
        try:
            return verified(path)
        except UserError as error:  # noqa: PERF203 - a handful of iterations
            logger.warning("skipping a checkpoint: %s", error)
    return None


def find(path: Path) -> StoredCheckpoint:
    """Return the checkpoint that a path names: the folder of a checkpoint, or of a run, for its newest one.

    Raises:
        UserError: there is none, or it is incomplete or damaged.
    """
    if (path / checkpoint_manifest.NAME).exists() or is_checkpoint_name(path.name):
        return verified(path)
    for folder in (path, path / "checkpoints"):
        if found := newest(folder):
            return found
    raise UserError(
        f"resume={str(path)!r}: there is no complete checkpoint; give the folder of a run or a checkpoint, step-..."
    )


def verified(path: Path) -> StoredCheckpoint:
    """Return a checkpoint after comparing every byte with what was written.

    Raises:
        UserError: it is incomplete or damaged.
    """
    manifest = checkpoint_manifest.read(path)
    checkpoint_manifest.verify(path, manifest)
    return StoredCheckpoint(path, manifest)


def is_checkpoint_name(name: str) -> bool:
    """Whether the folder of a checkpoint may have this name."""
    return _NAME.fullmatch(name) is not None


def later_than(path: Path) -> Sequence[Path]:
    """Return the checkpoints of later steps in the same folder, complete or not."""
    all_paths = checkpoints_in(path.parent)
    return all_paths[all_paths.index(path) + 1 :] if path in all_paths else []


def checkpoints_in(folder: Path) -> list[Path]:
    """Return all checkpoints, complete or not, the oldest first."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found, key=lambda entry: int(entry[0][1]))]


def partial_path(final: Path, attempt: str) -> Path:
    """Return the folder in which an attempt at the run writes a checkpoint until it is complete."""
    return final.with_name(f".{final.name}.{attempt}.partial")


def finalize(partial: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest into a folder whose files are all on disk, and give it its final name."""
    path = partial / checkpoint_manifest.NAME
    path.write_bytes(manifest.dump())
    sync(path)
    sync(partial)
    if final.exists():  # an incomplete one: otherwise this run would have resumed after that step
        delete(final)
    partial.rename(final)
    sync(final.parent)


def prune(folder: Path, keep: int, best: Best | None, *, thoroughly: bool = False) -> list[Path]:
    """Delete all but the newest ``keep`` complete checkpoints and the best one; return the deleted ones.

    Broken ones are deleted too, unless none is complete. A checkpoint is complete if its files have the right sizes;
    if ``thoroughly``, every byte is compared.
    """
    complete = [found for path in checkpoints_in(folder) if (found := _complete(path, thoroughly)) is not None]
    if not complete:
        return []
    chosen = best and best.select([found.manifest for found in complete])
    kept = {found.path for found in complete[-keep:]} | {found.path for found in complete if found.manifest is chosen}
    deleted = [path for path in checkpoints_in(folder) if path not in kept]
    for path in deleted:
        delete(path)
    return deleted


def remove_partial(folder: Path) -> None:
    """Delete what killed runs have left half written. No run may be writing."""
    for path in folder.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def delete(path: Path) -> None:
    """Delete a checkpoint, or a link to one."""
    if path.is_symlink():
        path.unlink()
        return
    (path / checkpoint_manifest.NAME).unlink(missing_ok=True)  # first: no half-deleted one looks complete
    shutil.rmtree(path)


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _complete(path: Path, thoroughly: bool) -> StoredCheckpoint | None:
    try:
        return verified(path) if thoroughly else StoredCheckpoint(path, checkpoint_manifest.read(path))
    except UserError:
        return None
