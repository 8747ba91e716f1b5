"""Texts and their labels from files as people have them. What cannot be read as meant is an error that says where."""

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


def read_samples(path: Path, shown: str) -> Iterator[Sample]:
    """All (text, label) of a .jsonl or .csv file, or of a folder with a file of paragraphs a class.

    Files are UTF-8, with or without a byte order mark. Texts may be empty.

    Args:
        shown: what the config calls ``path``, for messages.

    Raises:
        UserError: naming file and line: no UTF-8, no such columns, a row with more or fewer fields than the header,
            a quote that is never closed, a line that is no JSON object, or a text or label that is missing.
    """
    if path.is_dir():
        for file in sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith((".", "_"))):
            for paragraph in _content(file, f"{shown}/{file.name}").read().split("\n\n"):
                yield " ".join(paragraph.split()), file.stem
        return
    readers = {".csv": _rows, ".jsonl": _objects}
    if path.suffix.lower() not in readers:
        raise UserError(f"task.data={shown!r} should be a .jsonl or .csv file, or a folder with a file a class")
    for line, text, label in readers[path.suffix.lower()](path, shown):
        yield _word(text, "text", shown, line), _word(label, "label", shown, line)


def _content(path: Path, shown: str, newline: str | None = None) -> io.StringIO:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"task.data={shown!r} cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _fail(shown, content.count(b"\n", 0, error.start) + 1, "not valid UTF-8: save the file in that encoding", error)
    if not text.strip():
        raise UserError(f"task.data={shown!r} is empty")
    return io.StringIO(text, newline)


def _rows(path: Path, shown: str) -> Iterator[tuple[int, Any, Any]]:
    content = _content(path, shown, newline="")
    csv.field_size_limit(max(csv.field_size_limit(), len(content.getvalue())))
    reader = csv.reader(content, strict=True)
    rows = _numbered(reader, shown)
    line, header = next(rows)
    header = [name.strip() for name in header]
    if problem := _problem(header):
        _fail(shown, line, problem)
    text, label = map(header.index, _COLUMNS)
    for line, row in rows:
        if len(row) != len(header):
            number = f"{len(row)} field{'s' * (len(row) != 1)} where the header has {len(header)}"
            _fail(shown, line, f"{number}; a field with a comma in it needs quotes")
        yield line, row[text], row[label].strip()


def _numbered(reader: Any, shown: str) -> Iterator[tuple[int, list[str]]]:
    """Each row that is not empty, and the line on which it begins."""
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            _fail(shown, line, f"{error}: a quote is never closed, or not doubled within quotes", error)
        if row:
            yield line, row


def _problem(header: list[str]) -> str:
    """What is wrong with the names of the columns; empty if nothing is."""
    for name in _COLUMNS:
        if header.count(name) != 1:
            number = "two columns are" if name in header else "no column is"
            separated = any(mark in "".join(header) for mark in ";\t|")
            advice = "; separate columns by commas" if separated and len(header) == 1 else ""
            return f"{number} called {name!r}; the columns are {', '.join(map(repr, header)) or 'none'}{advice}"
    return ""


def _objects(path: Path, shown: str) -> Iterator[tuple[int, Any, Any]]:
    for line, content in enumerate(_content(path, shown), start=1):
        if not content.strip():
            continue
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            problem = getattr(error, "msg", "nested too deeply")
            _fail(shown, line, f"no JSON ({problem}): every line should be an object with text and label", error)
        if not isinstance(value, dict):
            _fail(shown, line, f"every line should be an object with text and label, not {content.strip()[:40]!r}")
        for name in _COLUMNS:
            if name not in value:
                _fail(shown, line, f"no {name}; its keys are {', '.join(map(repr, value)) or 'none'}")
        yield line, value["text"], value["label"]


def _word(value: Any, name: str, shown: str, line: int) -> str:
    """A text or a label as a string."""
    if value is None or (name == "label" and value == ""):
        _fail(shown, line, f"the {name} is missing")
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        _fail(shown, line, f"the {name} should be a string, not {json.dumps(value)[:40]}")
    word = str(value)
    try:
        word.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a character
        _fail(shown, line, f"the {name} has half of a surrogate pair: {error.reason}", error)
    return word


def _fail(shown: str, line: int, problem: str, cause: Exception | None = None) -> NoReturn:
    raise UserError(f"task.data={shown!r}, line {line}: {problem}") from cause
