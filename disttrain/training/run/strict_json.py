"""JSON that every parser reads: without NaN and infinities, which Python's ``json`` would write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Return JSON for other programs, with null for NaN and infinities."""
    return json.dumps(_replace(value, lambda number: None), indent=indent, allow_nan=False)


def encode(value: Any) -> Any:
    """Return ``value`` with the strings "NaN", "Infinity" and "-Infinity" for such numbers."""
    names = {str(number): name for name, number in _NON_FINITE.items()}
    return _replace(value, lambda number: names[str(number)])


def decode(value: Any) -> Any:
    """Return the value that ``encode`` was given."""
    if isinstance(value, dict):
        return {key: decode(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [decode(inner) for inner in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _replace(value: Any, replacement: Callable[[float], Any]) -> Any:
    """Return a copy in which non-finite numbers are replaced."""
    if isinstance(value, Mapping):
        return {key: _replace(inner, replacement) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replace(inner, replacement) for inner in value]
    return replacement(value) if isinstance(value, float) and not math.isfinite(value) else value
