"""Local paths in configs: ``~`` stands for the home directory, ``package:`` for an installed package."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from disttrain.errors import UserError

_PACKAGE = "package:"


def expand_home(path: str) -> str:
    """Return ``path`` with a leading ``~`` or ``~user`` replaced by that home directory.

    Raises:
        UserError: The user does not exist. The path would create a directory named ``~...``, which is risky to remove.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(
            f"{path!r} starts with the home directory of a user who does not exist: write './{path}' if '~' is part of "
            "the name"
        )
    return expanded


LocalPath = Annotated[str, AfterValidator(expand_home)]
"""Type of a config field that is a path: ``~`` is expanded when the config is read."""


def resolve(path: str, key: str) -> str:
    """Return ``path`` with ``~`` expanded, or the location of ``package:name/rest`` without importing the package.

    Args:
        path: A path from a config.
        key: The config key of the path, for messages.

    Raises:
        UserError: The user or the package does not exist.
    """
    if not path.startswith(_PACKAGE):
        return expand_home(path)
    name, _, rest = path.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{key}={path!r}: there is no installed package {name!r}")
    return str(Path(spec.submodule_search_locations[0]) / rest)
