"""Checkpoints on disk: which there are, whether they are whole, and writing a file down to the disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file, save_model
from torch import nn

from disttrain.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = 1
_NAME = re.compile(r"step-(\d+)")


class Found(NamedTuple):
    """A whole checkpoint."""

    path: Path
    manifest: dict[str, Any]


def newest(folder: Path) -> Found | None:
    """The newest whole checkpoint in a folder, or None. Broken ones are passed over with a warning."""
    for path in reversed(checkpoints_in(folder)):
        try:
            return Found(path, read_manifest(path))
        except UserError as error:  # noqa: PERF203 - a handful of them
            logger.warning("passing over a checkpoint: %s", error)
    return None


def find(path: Path) -> Found:
    """The checkpoint that a user names: its own folder, or the newest of a run's.

    Raises:
        UserError: there is none, or it is not whole.
    """
    if (path / "manifest.json").exists() or _NAME.fullmatch(path.name):
        return Found(path, read_manifest(path))
    for folder in (path, path / "checkpoints"):
        if found := newest(folder):
            return found
    raise UserError(f"resume={str(path)!r}: there is no whole checkpoint; give a folder step-..., or that of a run")


def later_than(path: Path) -> Sequence[Path]:
    """The checkpoints beside this one that are of later steps, whole or not."""
    beside = checkpoints_in(path.parent)
    return beside[beside.index(path) + 1 :] if path in beside else []


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints, whole or not, the oldest first."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found, key=lambda entry: int(entry[0][1]))]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, after comparing every file's size and hash with it.

    Raises:
        UserError: the checkpoint is not whole, or of a format that this version does not know.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise UserError(f"checkpoint {str(path)!r} has format {manifest['format']}, this version reads {FORMAT}")
        for name, entry in manifest["files"].items():
            if (path / name).stat().st_size != entry["bytes"] or _sha256(path / name) != entry["sha256"]:
                raise UserError(f"checkpoint {str(path)!r} is damaged: {name} is not what was written")
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {str(path)!r} is not whole: {error.filename} is missing") from error
    except UserError:
        raise
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"checkpoint {str(path)!r} is damaged: manifest.json is no manifest ({error!r})") from error
    return manifest


def write_file(
    path: Path, content: nn.Module | Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> dict[str, Any]:
    """Write a safetensors file down to the disk; its entry in the manifest.

    Raises:
        UserError: it cannot be written.
    """
    try:
        if isinstance(content, nn.Module):
            save_model(content, str(path))  # knows of parameters that modules share
        else:  # safetensors takes contiguous tensors that share no memory
            save_file({name: tensor.detach().contiguous().clone() for name, tensor in content.items()}, path, metadata)
    except SafetensorError as error:
        raise UserError(f"cannot write {str(path)!r}: {error}") from error
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def publish(partial: Path, final: Path, manifest: Mapping[str, Any], keep: int) -> None:
    """Give a folder whose files are all written its manifest and its name; delete all but the newest ``keep``."""
    (partial / "manifest.json").write_text(json.dumps({"format": FORMAT, **manifest}, indent=1))
    sync(partial / "manifest.json")
    sync(partial)
    if final.exists():  # the same step's, from before: it was not whole, or this run would have begun after it
        _delete(final)
    partial.rename(final)
    sync(final.parent)
    for old in checkpoints_in(final.parent)[:-keep]:
        _delete(old)


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    (path / "manifest.json").unlink(missing_ok=True)  # first, so that no half of it is ever taken for a whole
    shutil.rmtree(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
