"""Files of labeled texts in the variants that occur in practice."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.errors import UserError
from disttrain.tasks.samples import read_samples

LONG = "x" * 200_000
READ: dict[str, tuple[bytes, list[tuple[str, str]]]] = {
    "plain.csv": (
        b'label,text\npos,"good, really ""good"""\nneg,"two\nlines"\n',
        [('good, really "good"', "pos"), ("two\nlines", "neg")],
    ),
    "mark.csv": ("text,label\r\ngood,pos\r\n".encode("utf-8-sig"), [("good", "pos")]),
    "UPPER.CSV": (b"text,label\ngood,pos\n", [("good", "pos")]),
    "long.csv": (f"text,label\n{LONG},pos\n".encode(), [(LONG, "pos")]),
    "empty-lines.csv": (b"\ntext,label\n\ngood,pos\n\n", [("good", "pos")]),
    "spaces.csv": (b"text, label\ngood, pos\n", [("good", "pos")]),
    "other-columns.csv": (b"id,text,id,label\n1,good,1,pos\n", [("good", "pos")]),
    "old-mac.csv": (b"text,label\rgood,pos\r", [("good", "pos")]),
    "quote-inside.csv": (b'text,label\nthe 5" disk,pos\n', [('the 5" disk', "pos")]),
    "mark.jsonl": ('{"text": "good", "label": "pos"}\n'.encode("utf-8-sig"), [("good", "pos")]),
    "numbers.jsonl": (b'{"text": "good", "label": 1}\n\n{"label": true, "text": ""}\n', [("good", "1"), ("", "True")]),
    "line-separator.jsonl": ('{"text": "a\u2028b", "label": "x"}'.encode(), [("a\u2028b", "x")]),
}
REFUSED: dict[str, tuple[bytes, str]] = {
    "semicolons.csv": (
        b"text;label\na;b\n",
        ", line 1: no column is named 'text'; the columns are 'text;label'; separate columns by commas",
    ),
    "tabs.csv": (
        b"text\tlabel\na\tb\n",
        ", line 1: no column is named 'text'; the columns are 'text\\tlabel'; separate columns by commas",
    ),
    "capitals.csv": (b"Text,Label\na,b\n", ", line 1: no column is named 'text'; the columns are 'Text', 'Label'"),
    "twice.csv": (
        b"text,label,text\na,b,c\n",
        ", line 1: two columns are named 'text'; the columns are 'text', 'label', 'text'",
    ),
    "short.csv": (b'text,label\n"two\nlines",pos\ngood\n', ", line 4: 1 field, but the header has 2"),
    "comma.csv": (
        b"text,label\ngood, really good,pos\n",
        ", line 2: 3 fields, but the header has 2; a field with a comma needs quotes",
    ),
    "no-label.csv": (b"text,label\ngood,pos\nbad, \n", ", line 3: the label is missing"),
    "open-quote.csv": (
        b'text,label\nfine,pos\n"good,pos\nbad,neg\n',
        ", line 3: unexpected end of data: a quote is never closed",
    ),
    "undoubled-quote.csv": (
        b'text,label\n"a"b,pos\n',
        ", line 2: ',' expected after '\"': a quote is never closed, or not doubled",
    ),
    "latin.csv": ("text,label\ngood,pos\ncaf\u00e9,pos\n".encode("latin-1"), ", line 3: not valid UTF-8"),
    "utf16.csv": ("text,label\na,b\n".encode("utf-16"), ", line 1: not valid UTF-8"),
    "empty.csv": (b"", " is empty"),
    "blank.jsonl": (b"\n \n", " is empty"),
    "no-label.jsonl": (
        b'{"text": "a", "label": "b"}\n{"text": "a"}\n',
        ", line 2: the label is missing; the keys are 'text'",
    ),
    "null-label.jsonl": (b'{"text": "a", "label": null}\n', ", line 1: the label is missing"),
    "empty-label.jsonl": (b'{"text": "a", "label": ""}\n', ", line 1: the label is missing"),
    "null-text.jsonl": (b'{"text": null, "label": "b"}\n', ", line 1: the text is missing"),
    "nan.jsonl": (b'{"text": "a", "label": NaN}\n', ", line 1: the label should be a string, not NaN"),
    "list.jsonl": (b'{"text": ["a"], "label": 1}\n', ', line 1: the text should be a string, not ["a"]'),
    "array.jsonl": (
        b'[{"text": "a", "label": 1}]\n',
        ", line 1: each line should be an object with text and label, not '[{",
    ),
    "half.jsonl": (b'{"text": "a", "label": "b"}\n{"text": "a", "la', ", line 2: not JSON (Unterminated string"),
    "deep.jsonl": (b"[" * 100_000, ", line 1: not JSON (nested too deeply)"),
    "surrogate.jsonl": (b'{"text": "\\ud800", "label": 1}\n', ", line 1: the text has half of a surrogate pair"),
    "plain.txt": (b"a", " should be a .jsonl or .csv file"),
}


@pytest.mark.parametrize("name", READ)
def test_valid_files_are_read(tmp_path: Path, name: str) -> None:
    content, expected = READ[name]
    (tmp_path / name).write_bytes(content)
    assert list(read_samples(tmp_path / name, name)) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_files_are_refused_in_one_line_that_says_where(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_samples(tmp_path / name, name))
    assert str(caught.value).startswith(f"task.data={name!r}{message}")
    assert "\n" not in str(caught.value)


def test_a_folder_has_one_file_per_class(tmp_path: Path) -> None:
    (tmp_path / "pos.txt").write_bytes("good\r\nnews\r\n\r\nmore".encode("utf-8-sig"))
    (tmp_path / ".hidden").write_bytes(b"\xff")
    assert list(read_samples(tmp_path, "reviews")) == [("good news", "pos"), ("more", "pos")]
    (tmp_path / "neg.txt").write_bytes(b"bad\n\xff")
    with pytest.raises(UserError, match=r"^task.data='reviews/neg.txt', line 2: not valid UTF-8"):
        list(read_samples(tmp_path, "reviews"))
    (tmp_path / "neg.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"^task.data='reviews/neg.txt' is empty"):
        list(read_samples(tmp_path, "reviews"))
