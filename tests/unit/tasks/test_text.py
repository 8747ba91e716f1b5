from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disttrain.errors import UserError
from disttrain.tasks import text_files
from disttrain.tasks.text import GPT, Text, Windows


@given(st.binary(min_size=4, max_size=300), st.integers(2, 20))
def test_windows_predict_every_byte_but_the_first_once(text: bytes, context: int) -> None:
    windows = Windows(text, context)
    assert len(windows) == (len(text) - 1) // context
    if len(windows):
        batch = windows.__getitems__(range(len(windows)))
        assert batch.shape == (len(windows), context + 1)
        assert bytes(batch[:, 1:].flatten().tolist()) == text[1 : 1 + len(windows) * context]
        assert bytes(batch[:, :-1].flatten().tolist()) == text[: len(windows) * context]
        assert torch.equal(windows[0], batch[0])


@given(st.integers(1, 50), st.integers(1, 60))
def test_a_limit_spreads_windows_evenly(count: int, limit: int) -> None:
    windows = Windows(bytes(range(256)) * 2 + b"." * 100, 8, limit)
    starts = windows._starts // 8
    assert len(windows) == min(limit, (611) // 8)
    assert starts[0] == 0
    steps = starts[1:] - starts[:-1]
    assert len(steps) == 0 or steps.max() - steps.min() <= 1


def make_files(folder: Path, count: int = 60) -> None:
    for index in range(count):
        file = folder / f"part{index % 3}" / f"{index}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"file {index} " * 20)
    (folder / ".hidden").mkdir()
    (folder / ".hidden/secret.txt").write_text("secret " * 50)


def test_whole_files_are_held_out_regardless_of_the_folders_location(tmp_path: Path) -> None:
    splits = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        make_files(tmp_path / name)
        splits.append(Text(path=str(tmp_path / name), held_out=0.2)._split)
    assert splits[0] == splits[1]
    train, held_out = splits[0]
    for index in range(60):
        text = f"file {index} ".encode() * 20
        assert (text in train) != (text in held_out)
    assert 3 <= held_out.count(b"\0") <= 25
    assert b"secret" not in train + held_out


def test_a_glob_and_a_single_folder_level(tmp_path: Path) -> None:
    make_files(tmp_path)
    task = Text(path=str(tmp_path / "part1" / "*.txt"), held_out=0.3)
    assert sum(text.count(b"\0") for text in task._split) == 20


BOOK = "".join(f"line {number} of the book\n" for number in range(2000)).encode()


@pytest.mark.parametrize("path", ["book/input.txt", "book", "book/*.txt", "book/inpu?.txt", "b[ao]ok/*.txt"])
@pytest.mark.parametrize("held_out", [0.05, 0.3, 0.999])  # with 0.999 the hash of its path would hold out the file
def test_the_end_of_a_single_file_is_held_out(tmp_path: Path, path: str, held_out: float) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "book/input.txt").write_bytes(BOOK)
    train, rest = Text(path=f"{tmp_path}/{path}", held_out=held_out, context=16)._split
    assert train.removesuffix(b"\0") + rest.removesuffix(b"\0") == BOOK
    assert len(rest) == pytest.approx(held_out * len(BOOK), abs=2)


def test_the_ends_of_few_files_are_held_out_if_no_whole_file_is(tmp_path: Path) -> None:
    for name, size in {"a.txt": 1000, "b.txt": 3000, "empty.txt": 0}.items():
        (tmp_path / name).write_bytes(name[:1].encode() * size)
    train, rest = Text(path=str(tmp_path), held_out=0.01, context=16)._split
    assert train == b"a" * 990 + b"\0" + b"b" * 2970 + b"\0"
    assert rest == b"a" * 10 + b"\0" + b"b" * 30 + b"\0"


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "book[1].txt").write_bytes(BOOK)
    assert text_files.find(f"{tmp_path}/book[1].txt") == [("book[1].txt", tmp_path / "book[1].txt")]


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task.path: '.*gone.txt' cannot be read: No such file or directory"):
        text_files.read([("gone.txt", tmp_path / "gone.txt")])


def test_the_default_is_the_standard_library() -> None:
    names = [name for name, _ in text_files.find(None)]
    assert "argparse.py" in names
    assert names == sorted(names)
    assert not any("site-packages" in name or name.startswith("test/") for name in names)


def test_text_that_is_missing_or_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"matches no file: give a folder, a file, or a glob"):
        Text(path=str(tmp_path / "*.txt")).train_data()
    make_files(tmp_path, 2)
    with pytest.raises(UserError, match=r"bytes to hold out, too few for one window of 129: add text, or change"):
        Text(path=str(tmp_path), held_out=0.0001).train_data()


def test_heads_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"task.width=10 must be a multiple of task.heads=4"):
        Text(width=10)


def test_the_model_is_causal() -> None:
    torch.manual_seed(0)
    model = GPT(context=12, width=16, heads=2, layers=2, dropout=0.0).double()
    tokens = torch.randint(0, 256, (3, 12))
    changed = tokens.clone()
    changed[:, 7:] = 1
    first, second = model(tokens), model(changed)
    torch.testing.assert_close(first[:, :7], second[:, :7])
    assert not torch.allclose(first[:, 7:], second[:, 7:])


def test_an_untrained_model_needs_eight_bits_per_byte(tmp_path: Path) -> None:
    make_files(tmp_path)
    task = Text(path=str(tmp_path), held_out=0.3, width=32, layers=1, context=32)
    torch.manual_seed(0)
    data = task.eval_data()
    assert isinstance(data, Windows)
    with torch.no_grad():
        total, count = task.evaluate(task.build_model(), data.__getitems__(range(8)))["bits_per_byte"]
    assert count == 8 * 32
    assert float(total) / count == pytest.approx(math.log2(256), rel=0.05)


def test_dropout_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    model = GPT(context=8, width=16, heads=2, layers=1, dropout=0.5)
    tokens = torch.randint(0, 256, (2, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_text_of_an_installed_package_is_found_by_its_name() -> None:
    names = [name for name, _ in text_files.find("package:disttrain/tasks/*.py")]
    assert {"tasks/base.py", "tasks/text.py"} <= set(names)
    with pytest.raises(UserError, match="there is no installed package 'nosuchthing'"):
        Text(path="package:nosuchthing/*.py").train_data()
    with pytest.raises(UserError, match="matches no file"):
        Text(path="package:disttrain/*.nothing").train_data()
