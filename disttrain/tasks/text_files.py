"""The files of a text, and the part of it that is held out."""

from __future__ import annotations

import glob
import hashlib
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from disttrain.errors import UserError
from disttrain.tasks.paths import resolve

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_END_OF_FILE = b"\0"


def find(path: str | None) -> list[tuple[str, Path]]:
    """Return (name, file) of each file found. Names are relative to the root of the search, not to its location.

    Args:
        path: A folder, a file, or a glob, possibly in an installed package; None: the standard library's .py files.

    Raises:
        UserError: No file was found.
    """
    place = path and resolve(path, "task.path")
    if place is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in root.rglob("*.py") if _NOT_LIBRARY.isdisjoint(file.relative_to(root).parts)]
    elif Path(place).is_dir():
        root = Path(place)
        files = [file for file in root.rglob("*") if "/." not in f"/{file.relative_to(root).as_posix()}"]
    elif Path(place).is_file():  # before globs: its name may have brackets
        root, files = Path(place).parent, [Path(place)]
    else:
        files = [Path(name) for name in glob.glob(place, recursive=True)]
        root = Path(re.split(r"[*?[]", place)[0]).parent
    found = sorted((file.relative_to(root).as_posix(), file) for file in files if file.is_file())
    if not found:
        raise UserError(f"task.path={path!r} matches no file: give a folder, a file, or a glob like 'texts/*.txt'")
    return found


def read(files: Sequence[tuple[str, Path]]) -> list[tuple[str, bytes]]:
    """Return the names and contents of the files.

    Raises:
        UserError: A file cannot be read.
    """
    try:
        return [(name, file.read_bytes()) for name, file in files]
    except OSError as error:
        raise UserError(f"task.path: {error.filename!r} cannot be read: {error.strerror}") from error


def split_by_file(files: Sequence[tuple[str, bytes]], held_out: float) -> tuple[bytes, bytes]:
    """Return (training text, held-out text), with whole files held out by a hash of their names."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for name, content in files:
        is_held_out = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 < held_out
        parts[is_held_out].append(content)
    return _join(parts[0]), _join(parts[1])


def split_within(files: Sequence[tuple[str, bytes]], held_out: float) -> tuple[bytes, bytes]:
    """Return (training text, held-out text), with the last ``held_out`` of each file's bytes held out."""
    contents = [content for _, content in files]
    ends = [len(content) - round(held_out * len(content)) for content in contents]
    parts = [(content[:end], content[end:]) for content, end in zip(contents, ends, strict=True)]
    return _join([train for train, _ in parts if train]), _join([end for _, end in parts if end])


def _join(contents: Sequence[bytes]) -> bytes:
    return b"".join(content + _END_OF_FILE for content in contents)
