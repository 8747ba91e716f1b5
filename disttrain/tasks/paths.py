"""Where a task's local files lie."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from disttrain.errors import UserError

_PACKAGE = "package:"


def resolve(path: str, key: str) -> str:
    """``path`` itself, or where ``package:name/rest`` lies in an installed package, which is not imported.

    Raises:
        UserError: there is no such package; ``key`` is where the path stands, for messages.
    """
    if not path.startswith(_PACKAGE):
        return path
    name, _, rest = path.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{key}={path!r}: there is no installed package {name!r}")
    return str(Path(spec.submodule_search_locations[0]) / rest)
