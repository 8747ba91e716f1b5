"""YAML values that mean what they look like.

PyYAML follows YAML 1.1, in which ``010`` is 8, ``1:30`` is 90, and a run that is called ``no`` is called False. Here,
only plain numbers, ``true``, ``false`` and ``null`` are converted, as in the core schema of YAML 1.2. Everything else
stays text, and the type of its field decides: ``010`` and ``1_000`` are ten and a thousand in a numeric field, ``on``
and ``no`` are true and false in a Boolean field, and a name keeps its spelling.
"""

from __future__ import annotations

import re
from typing import IO, Any, ClassVar

import yaml  # type: ignore[import-untyped]

# By tag: a pattern, and the characters that its matches may start with. The first match counts.
_PATTERNS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", ["<"]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes what either version of YAML would not read as text."""


for _kind, (_pattern, _first) in _PATTERNS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _first)


def read(text: str | IO[str]) -> Any:
    """Return the value of a YAML document.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, Loader=_Loader)


def dump(value: Any) -> str:
    """Return YAML from which ``read`` returns the value, with keys in their order."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False))
