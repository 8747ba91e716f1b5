"""Tables, and the files that a benchmark writes."""

from __future__ import annotations

import datetime
import io
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.machine import summarize_machine


def make_table(title: str, text: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table with left-aligned ``text`` columns, then right-aligned ``numbers``."""
    table = Table(title=title)
    for column in text:
        table.add_column(column)
    for column in numbers:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def write_result(
    table: Table, result: dict[str, Any], output: Path, benchmark: str, label: str = "", width: int = 140
) -> Path:
    """Print the table and write the result.

    The files are ``<output>/<benchmark>/<date>[-<label>].json`` with all figures and the same name with ``.md`` for
    table, machine and command. If the name is taken, a number is appended.

    Args:
        table: what is printed.
        result: all figures, as JSON values; ``result["machine"]`` comes from ``describe_machine``.
        output: parent directory of the benchmark's results.
        benchmark: subdirectory, the name of the benchmark's command.
        label: distinguishes results of the same benchmark and day.
        width: characters in a line of the table.

    Returns:
        The path of the Markdown file.
    """
    Console(width=width).print(table)
    day = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    stem = "-".join(part for part in (day, label) if part)
    directory = output / benchmark
    directory.mkdir(parents=True, exist_ok=True)
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    path = next(path for name in names if not (path := directory / f"{name}.md").exists())
    path.with_suffix(".json").write_text(json.dumps(result) + "\n")
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    path.write_text(f"```\n{text.getvalue()}\n{summarize_machine(result['machine'])}\n```\n")
    Console(stderr=True).print(f"written: {path}")
    return path
