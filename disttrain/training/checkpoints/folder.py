"""Checkpoints on disk: which there are, which of them stay, and giving one its name once it is whole."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from disttrain.errors import UserError
from disttrain.training.checkpoints import manifest as checkpoint_manifest
from disttrain.training.checkpoints.manifest import Manifest
from disttrain.validation import Section, hint

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{1,15})", re.ASCII)


class Best(Section):
    """Which checkpoint is the best: that of the best evaluation at the very step at which it was saved."""

    metric: str = Field(description="the held-out metric, as the task names it: accuracy, bits_per_byte, loss")
    mode: Literal["min", "max"] = Field(description="whether smaller or larger values are better")

    def check(self, metrics: Mapping[str, Any]) -> None:
        """Raise UserError if there is no such metric."""
        if self.metric not in metrics:
            known = hint(self.metric, list(metrics))
            raise UserError(f"checkpoint.keep_best.metric={self.metric!r} is no metric of the task{known}")

    def of(self, manifests: Sequence[Manifest]) -> Manifest | None:
        """The best one, of equals the earliest; None if none was evaluated."""
        sign = 1.0 if self.mode == "min" else -1.0
        rated = [(sign * value, one.step, one) for one in manifests if (value := self._value(one)) is not None]
        return min(rated, key=lambda entry: entry[:2])[2] if rated else None

    def _value(self, manifest: Manifest) -> float | None:
        value = manifest.metrics.get(self.metric)
        return value if value is not None and math.isfinite(value) else None


class Found(NamedTuple):
    """A checkpoint, and its manifest."""

    path: Path
    manifest: Manifest


def newest(folder: Path) -> Found | None:
    """The newest whole checkpoint in a folder, or None. Broken ones are passed over with a warning that says why."""
    for path in reversed(checkpoints_in(folder)):
        try:
            return verified(path)
        except UserError as error:  # noqa: PERF203 - a handful of them
            logger.warning("passing over a checkpoint: %s", error)
    return None


def find(path: Path) -> Found:
    """The checkpoint that a user names: its own folder, or the newest of a run's.

    Raises:
        UserError: there is none, or it is not whole.
    """
    if (path / checkpoint_manifest.NAME).exists() or is_name(path.name):
        return verified(path)
    for folder in (path, path / "checkpoints"):
        if found := newest(folder):
            return found
    raise UserError(f"resume={str(path)!r}: there is no whole checkpoint; give a folder step-..., or that of a run")


def verified(path: Path) -> Found:
    """A checkpoint whose every byte is what was written.

    Raises:
        UserError: it is not whole.
    """
    manifest = checkpoint_manifest.read(path)
    checkpoint_manifest.verify(path, manifest)
    return Found(path, manifest)


def is_name(name: str) -> bool:
    """Whether a checkpoint's folder is called so."""
    return _NAME.fullmatch(name) is not None


def later_than(path: Path) -> Sequence[Path]:
    """The checkpoints beside this one that are of later steps, whole or not."""
    beside = checkpoints_in(path.parent)
    return beside[beside.index(path) + 1 :] if path in beside else []


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints, whole or not, the oldest first."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found, key=lambda entry: int(entry[0][1]))]


def partial_of(final: Path, attempt: str) -> Path:
    """Where a checkpoint is written until it is whole; another place for each attempt at the run."""
    return final.with_name(f".{final.name}.{attempt}.partial")


def publish(partial: Path, final: Path, manifest: Manifest) -> None:
    """Give a folder whose files are all on the disk its manifest and its name."""
    path = partial / checkpoint_manifest.NAME
    path.write_bytes(manifest.dump())
    sync(path)
    sync(partial)
    if final.exists():  # the same step's, from before: it was not whole, or this run would have begun after it
        delete(final)
    partial.rename(final)
    sync(final.parent)


def prune(folder: Path, keep: int, best: Best | None, *, thoroughly: bool = False) -> list[Path]:
    """Delete all but the newest ``keep`` whole checkpoints and the best one; those deleted.

    Broken ones go too. Nothing is deleted where none is whole. To be whole, files must have their sizes;
    ``thoroughly``, every byte is compared.
    """
    whole = [found for path in checkpoints_in(folder) if (found := _whole(path, thoroughly)) is not None]
    if not whole:
        return []
    chosen = best and best.of([found.manifest for found in whole])
    stay = {found.path for found in whole[-keep:]} | {found.path for found in whole if found.manifest is chosen}
    gone = [path for path in checkpoints_in(folder) if path not in stay]
    for path in gone:
        delete(path)
    return gone


def remove_partial(folder: Path) -> None:
    """Delete what killed runs left half written. No run may be writing."""
    for path in folder.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def delete(path: Path) -> None:
    """Delete a checkpoint; of a link to one, the link alone."""
    if path.is_symlink():
        path.unlink()
        return
    (path / checkpoint_manifest.NAME).unlink(missing_ok=True)  # first: no half of it is ever taken for a whole
    shutil.rmtree(path)


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _whole(path: Path, thoroughly: bool) -> Found | None:
    try:
        return verified(path) if thoroughly else Found(path, checkpoint_manifest.read(path))
    except UserError:
        return None
