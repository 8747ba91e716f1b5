"""Labeled texts from .csv and .jsonl files and from folders. Malformed input raises an error that names the line."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from disttrain.errors import UserError

_COLUMNS = ("text", "label")
Sample = tuple[str, str]


def read_samples(path: Path, name: str) -> Iterator[Sample]:
    """Yield (text, label) from a .jsonl or .csv file, or from a folder with one file of paragraphs per class.

    Files are UTF-8, with or without a byte order mark. Texts may be empty.

    Args:
        path: The file or folder.
        name: The path as written in the config, for messages.

    Raises:
        UserError: The file is not UTF-8, a column is missing, a row has more or fewer fields than the header, a quote
            is never closed, a line is not a JSON object, or a text or label is missing. The message has file and line.
    """
    if path.is_dir():
        for file in sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith((".", "_"))):
            for paragraph in _open(file, f"{name}/{file.name}").read().split("\n\n"):
                yield " ".join(paragraph.split()), file.stem
        return
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise UserError(f"task.data={name!r} should be a .jsonl or .csv file, or a folder with one file per class")
    for line, text, label in readers[path.suffix.lower()](path, name):
        yield _to_string(text, "text", name, line), _to_string(label, "label", name, line)


def _open(path: Path, name: str, newline: str | None = None) -> io.StringIO:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"task.data={name!r} cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        _fail(name, line, "not valid UTF-8: save the file in that encoding", error)
    if not text.strip():
        raise UserError(f"task.data={name!r} is empty")
    return io.StringIO(text, newline)


def _read_csv(path: Path, name: str) -> Iterator[tuple[int, Any, Any]]:
    content = _open(path, name, newline="")
    csv.field_size_limit(max(csv.field_size_limit(), len(content.getvalue())))
    rows = _numbered_rows(csv.reader(content, strict=True), name)
    line, header = next(rows)
    header = [column.strip() for column in header]
    if problem := _header_problem(header):
        _fail(name, line, problem)
    text, label = map(header.index, _COLUMNS)
    for line, row in rows:
        if len(row) != len(header):
            fields = f"{len(row)} field{'s' * (len(row) != 1)}"
            _fail(name, line, f"{fields}, but the header has {len(header)}; a field with a comma needs quotes")
        yield line, row[text], row[label].strip()


def _numbered_rows(reader: Any, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not empty, with the number of its first line."""
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            _fail(name, line, f"{error}: a quote is never closed, or not doubled within quotes", error)
        if row:
            yield line, row


def _header_problem(header: list[str]) -> str:
    """Return what is wrong with the columns, or an empty string."""
    for column in _COLUMNS:
        if header.count(column) != 1:
            number = "two columns are" if column in header else "no column is"
            has_other_separator = any(mark in "".join(header) for mark in ";\t|")
            advice = "; separate columns by commas" if has_other_separator and len(header) == 1 else ""
            return f"{number} named {column!r}; the columns are {', '.join(map(repr, header)) or 'none'}{advice}"
    return ""


def _read_jsonl(path: Path, name: str) -> Iterator[tuple[int, Any, Any]]:
    for line, content in enumerate(_open(path, name), start=1):
        if not content.strip():
            continue
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            problem = getattr(error, "msg", "nested too deeply")
            _fail(name, line, f"not JSON ({problem}): each line should be an object with text and label", error)
        if not isinstance(value, dict):
            _fail(name, line, f"each line should be an object with text and label, not {content.strip()[:40]!r}")
        for key in _COLUMNS:
            if key not in value:
                _fail(name, line, f"the {key} is missing; the keys are {', '.join(map(repr, value)) or 'none'}")
        yield line, value["text"], value["label"]


def _to_string(value: Any, column: str, name: str, line: int) -> str:
    if value is None or (column == "label" and value == ""):
        _fail(name, line, f"the {column} is missing")
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        _fail(name, line, f"the {column} should be a string, not {json.dumps(value)[:40]}")
    string = str(value)
    try:
        string.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        _fail(name, line, f"the {column} has half of a surrogate pair: {error.reason}", error)
    return string


def _fail(name: str, line: int, problem: str, cause: Exception | None = None) -> NoReturn:
    raise UserError(f"task.data={name!r}, line {line}: {problem}") from cause
