"""Gradient compressors, one file an algorithm. Every compressor in this folder is found and registered by itself."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from disttrain.compression.base import REGISTRY, Bucket, Compressor, NewState, Program, State
from disttrain.compression.codec import Codec, Payload
from disttrain.compression.dense import Dense
from disttrain.compression.powersgd import PowerSGD
from disttrain.compression.qsgd import QSGD
from disttrain.compression.topk import TopK
from disttrain.errors import UserError

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "QSGD",
    "Bucket",
    "Codec",
    "Compressor",
    "Dense",
    "NewState",
    "Payload",
    "PowerSGD",
    "Program",
    "State",
    "TopK",
    "build",
    "names",
]


def names() -> list[str]:
    """The names of all registered compressors."""
    return sorted(REGISTRY)


def build(spec: Compressor | str | Mapping[str, Any]) -> Compressor:
    """A compressor from an instance, a name, or a mapping as in a config (``{"name": "topk", "ratio": 0.01}``).

    Raises:
        UserError: an unknown name or option, or a value out of bounds.
    """
    if isinstance(spec, Compressor):
        return spec
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name is None:
        raise UserError(f"the compressor needs a name, one of {', '.join(names())}; got {options}")
    if name not in REGISTRY:
        raise UserError(f"unknown compressor {name!r}{_nearest(str(name), names())}: choose from {', '.join(names())}")
    compressor = REGISTRY[name]
    try:
        return compressor(**options)
    except ValidationError as error:
        problem = error.errors()[0]
        option = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = list(compressor.model_fields)
            hint = f"{_nearest(option, known)}: {name} takes {', '.join(known)}"
            raise UserError(f"unknown option {option!r} of compressor {name!r}{hint}") from None
        given = problem["input"]
        raise UserError(f"compressor {name!r}: {option}={given!r} is wrong: {problem['msg']}") from None


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
