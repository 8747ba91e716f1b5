"""The manifest of a checkpoint, and comparing the files with it.

A checkpoint may come from anywhere, so nothing in it is trusted. The manifest is limited in size and depth and holds
its own hash. It lists the other files, but only known names are accepted, none of which can leave the folder. Links are
not followed. Sizes are compared before anything is read. safetensors' parser checks headers, offsets and shapes.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import stat
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from disttrain.errors import UserError
from disttrain.training.run import strict_json

NAME = "manifest.json"
_FORMAT = 2
_MAX_BYTES = 32 * 2**20
_MAX_DEPTH = 32
TENSOR_PARTS = ("average", "best")
"""Parts of a run that have a file of tensors of their own, besides model, optimizer and compression."""
_NUMBERS = ("progress", "optimizer", "loss_scale", "metrics")  # may hold NaN and infinities, encoded as strings
_FILES = re.compile(rf"(model|optimizer|compression|{'|'.join(TENSOR_PARTS)}|rank-\d{{5,9}})\.safetensors", re.ASCII)


def rank_file(rank: int) -> str:
    """Return the name of a rank's own file."""
    return f"rank-{rank:05d}.safetensors"


def identity(run: str, step: int) -> dict[str, str]:
    """Return what the header of every file of a checkpoint holds."""
    return {"run": run, "step": str(step)}


class FileEntry(BaseModel):
    """The size of a file in bytes, and its hash in hex."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def versions() -> dict[str, str]:
    """Return the versions of the software that writes a checkpoint."""
    return {"disttrain": metadata.version("disttrain"), "torch": torch.__version__, "python": platform.python_version()}


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


class Manifest(BaseModel):
    """The content of ``manifest.json``. Keys that a later version adds to this format are ignored.

    Attributes:
        run: identity of the run, which the header of every file holds too.
        progress, optimizer, loss_scale, compression_step: state to resume from.
        metrics: of the evaluation at this step; empty if there was none.
        files: all other files of the checkpoint, by name.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    format: Literal[2] = 2
    run: str = Field(pattern=r"^[0-9a-f]{32}$")
    step: int = Field(ge=0, lt=2**53)
    world_size: int = Field(ge=1, le=10**9)
    date: str = Field(default_factory=now, max_length=64)
    versions: dict[str, str] = Field(default_factory=versions)
    progress: dict[str, Any]
    config: dict[str, Any]
    optimizer: dict[str, Any] = {}
    compression_step: int = Field(default=0, ge=0, lt=2**53)
    loss_scale: dict[str, Any] | None = None
    metrics: dict[str, float] = {}
    files: dict[str, FileEntry]

    @property
    def num_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    def dump(self) -> bytes:
        """Return the content of the file: JSON, with the hash of everything else under ``checksum``."""
        body = {key: strict_json.encode(value) for key, value in self.model_dump().items()}
        return json.dumps({"checksum": _checksum(body), **body}, indent=1, allow_nan=False).encode()


def read(folder: Path) -> Manifest:
    """Read the manifest, and compare the names and sizes of the files with it, but not their contents.

    Raises:
        UserError: the checkpoint is incomplete, damaged, or of a format that this version does not know.
    """
    where = f"checkpoint {str(folder)!r}"
    try:
        manifest = _parse(_content(folder / NAME))
        if (match := re.fullmatch(r"step-(\d+)", folder.name)) and int(match[1]) != manifest.step:
            raise UserError(f"is damaged: {NAME} belongs to step {manifest.step}")
        _check_names(manifest)
        for name, entry in manifest.files.items():
            if (size := _regular(folder / name).st_size) != entry.bytes:
                raise UserError(f"is damaged: {name} has {size} bytes, {entry.bytes} were written")
    except FileNotFoundError as error:
        raise UserError(f"{where} is incomplete: {Path(error.filename).name} is missing") from error
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}: {error.filename}") from error
    except UserError as error:
        raise UserError(f"{where} {error}") from error
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare the contents of every file with the manifest, which ``read`` has returned.

    Raises:
        UserError: a file is not what was written.
    """
    expected = identity(manifest.run, manifest.step)
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: value for key, value in (file.metadata() or {}).items() if key in expected}
            problem = "" if found == expected else f"belongs to run {found.get('run')}, step {found.get('step')}"
            if not problem and sha256(path) != entry.sha256:
                problem = "is not what was written"
        except (OSError, SafetensorError) as error:
            problem = f"cannot be read ({error})"
        if problem:
            raise UserError(f"checkpoint {str(folder)!r} is damaged: {name} {problem}")


def entry_of(path: Path) -> FileEntry:
    """Return the manifest's entry for a file."""
    return FileEntry(bytes=path.stat().st_size, sha256=sha256(path))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def parse_json(content: bytes) -> Any:
    """Parse JSON of limited depth.

    Raises:
        UserError: the content is not JSON, or is nested too deeply.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({str(error)[:80]})") from error
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise UserError(f"nested more than {_MAX_DEPTH} deep")
        inner = [list(part.values()) if isinstance(part, dict) else part for part in level]
        level = [one for part in inner if isinstance(part, list) for one in part if isinstance(one, dict | list)]
    return value


def _parse(content: bytes) -> Manifest:
    try:
        body = parse_json(content)
    except UserError as error:
        raise UserError(f"is damaged: {NAME} is {error}") from error
    if not isinstance(body, dict) or "format" not in body:
        raise UserError(f"is damaged: {NAME} is not a manifest")
    if body["format"] != _FORMAT:
        raise UserError(f"has format {str(body['format'])[:20]}, and this version reads format {_FORMAT}")
    if body.pop("checksum", None) != _checksum(body):
        raise UserError(f"is damaged: {NAME} is not what was written")
    try:
        return Manifest.model_validate({k: strict_json.decode(v) if k in _NUMBERS else v for k, v in body.items()})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"is damaged: {NAME} has an invalid {key!r}: {first['msg']}") from error


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_names(manifest: Manifest) -> None:
    ranks = {rank_file(rank) for rank in range(min(manifest.world_size, len(manifest.files) + 1))}
    needed = {"model.safetensors", "optimizer.safetensors", "compression.safetensors", *ranks}
    if missing := sorted(needed - manifest.files.keys()):
        raise UserError(f"is damaged: {NAME} does not list {missing[0]}")
    for name in manifest.files:
        if not _FILES.fullmatch(name) or (name.startswith("rank-") and name not in ranks):
            raise UserError(f"is damaged: {NAME} lists {name[:80]!r}, which is not a file of a checkpoint")


def _regular(path: Path) -> os.stat_result:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"is damaged: {path.name} is not a regular file")
    return found


def _content(path: Path) -> bytes:
    if (size := _regular(path).st_size) > _MAX_BYTES:
        raise UserError(f"is damaged: {path.name} has {size} bytes, more than any manifest has")
    with path.open("rb") as file:
        return file.read(_MAX_BYTES)
