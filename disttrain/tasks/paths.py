"""Where local files lie: ``~`` is the home folder, ``package:`` an installed package."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from disttrain.errors import UserError

_PACKAGE = "package:"


def expand_home(path: str) -> str:
    """``path`` with a leading ``~`` or ``~user`` replaced by that home folder.

    Raises:
        UserError: there is no such user; a folder that is called ``~...`` would be made, and is risky to remove.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{path!r} begins with the home folder of a user who does not exist: write './{path}' if meant")
    return expanded


LocalPath = Annotated[str, AfterValidator(expand_home)]
"""The type of a config field that holds a path: ``~`` is expanded when the config is read."""


def resolve(path: str, key: str) -> str:
    """``path`` with ``~`` expanded, or where ``package:name/rest`` lies in an installed package, which is not imported.

    Raises:
        UserError: there is no such user or package; ``key`` is where the path stands, for messages.
    """
    if not path.startswith(_PACKAGE):
        return expand_home(path)
    name, _, rest = path.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{key}={path!r}: there is no installed package {name!r}")
    return str(Path(spec.submodule_search_locations[0]) / rest)
