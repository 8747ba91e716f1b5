"""Values of command-line options: link rates, compressors, environment variables."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common.machine import ROOT

NUM_CORES = os.cpu_count() or 1
RESULTS = ROOT / "benchmarks" / "results"
OutputOption = Annotated[Path, typer.Option(help="Parent directory of the result files.")]
SeedsOption = Annotated[int, typer.Option(min=1, help="Runs of each kind, with the seeds 0, 1, ...")]
JobsOption = Annotated[int, typer.Option(min=1, help="Runs side by side.")]
LabelOption = Annotated[str, typer.Option(help="Appended to the names of the result files.")]


def parse_rate(text: str) -> float | None:
    """Return the rate in Mbit/s, or None for an unshaped link."""
    factors = {"gbit": 1000.0, "mbit": 1.0}
    if text == "none":
        return None
    for unit, factor in factors.items():
        with contextlib.suppress(ValueError):
            if text.endswith(unit) and float(text.removesuffix(unit)) > 0:
                return float(text.removesuffix(unit)) * factor
    raise typer.BadParameter(f"invalid rate {text!r}: write 1gbit, 100mbit, ... or none")


def parse_compressor(text: str) -> dict[str, Any]:
    """Parse ``name:field=value,field=value`` into the mapping that a config has. Values may be JSON."""
    name, _, fields = text.partition(":")
    compressor: dict[str, Any] = {"name": name}
    for item in _split(fields) if fields else []:
        key, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"expected field=value, got {item!r} in {text!r}")
        try:
            compressor[key] = json.loads(value)
        except json.JSONDecodeError:
            compressor[key] = value
    return compressor


def describe_compressor(spec: dict[str, Any]) -> str:
    """Return ``name, field=value, ...``."""
    return ", ".join([spec["name"], *(f"{key}={value}" for key, value in spec.items() if key != "name")])


def parse_environment(texts: list[str]) -> dict[str, str]:
    """Parse a list of ``NAME=VALUE``."""
    pairs = [text.partition("=") for text in texts]
    if invalid := [text for text, (name, equals, _) in zip(texts, pairs, strict=True) if not (name and equals)]:
        raise typer.BadParameter(f"expected NAME=VALUE, got {invalid[0]!r}")
    return {name: value for name, _, value in pairs}


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
