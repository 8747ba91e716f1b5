from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from disttrain.errors import UserError
from disttrain.training import config as configs
from disttrain.training.config import yaml_values

CONFIG = "task: {name: tests.support.tiny_task:Tiny}\nepochs: 1\noptimizer: {name: sgd, lr: 0.1}\n"


def load(folder: Path, line: str, *, by: str) -> configs.Config:
    """A config with one more line, in its file or as an override."""
    path = folder / "config.yaml"
    path.write_text(CONFIG + (line.replace("=", ": ") + "\n" if by == "file" else ""))
    return configs.load(path, [] if by == "file" else [line])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("-3", -3), ("0", 0), ("0x1F", 31), ("1.5", 1.5), ("1.", 1.0), (".5", 0.5), ("1e-3", 0.001),
        ("-2.5E+3", -2500.0), (".inf", math.inf), ("true", True), ("False", False), ("null", None), ("~", None),
        ("", None), ("010", "010"), ("-010", "-010"), ("010.5", "010.5"), ("1_000", "1_000"), ("0b11", "0b11"),
        ("1:30", "1:30"), ("on", "on"), ("no", "no"), ("yes", "yes"), ("2024-01-01", "2024-01-01"), ("'12'", "12"),
        ("[1, 010, off]", [1, "010", "off"]), ("{on: 1}", {"on": 1}),
    ],
)  # fmt: skip
def test_only_what_is_plainly_a_number_or_a_truth_value_is_one(text: str, value: Any) -> None:
    found = yaml_values.read(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("by", ["file", "override"])
@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("batch_size=010", "batch_size", 10),
        ("batch_size=1_000", "batch_size", 1000),
        ("timeout=010.5", "timeout", 10.5),
        ("timeout=1e3", "timeout", 1000.0),
        ("drop_last=on", "drop_last", True),
        ("drop_last=yes", "drop_last", True),
        ("deterministic=no", "deterministic", False),
        ("name=on", "name", "on"),
        ("name=no", "name", "no"),
        ("name=010", "name", "010"),
        ("name=1_000", "name", "1_000"),
        ("name=0b11", "name", "0b11"),
        ("name=7", "name", "7"),
    ],
)
def test_the_type_of_the_field_decides(tmp_path: Path, line: str, key: str, value: Any, by: str) -> None:
    config = load(tmp_path, line, by=by)
    found = getattr(config, key)
    assert (found, type(found)) == (value, type(value))
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert configs.load(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("by", ["file", "override"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batch_size=1:30", "batch_size='1:30' should be a valid integer"),
        ("timeout=1:30", "timeout='1:30' should be a valid number"),
        ("batch_size=0b11", "batch_size='0b11' should be a valid integer"),
        ("batch_size=on", "batch_size='on' should be a valid integer"),
        ("timeout=.inf", "timeout=inf should be a finite number"),
        ("timeout=inf", "timeout='inf' should be a finite number"),
        ("drop_last=never", "drop_last='never' should be a valid boolean"),
    ],
)
def test_what_is_no_number_is_one_line(tmp_path: Path, line: str, message: str, by: str) -> None:
    with pytest.raises(UserError, match="^" + message):
        load(tmp_path, line, by=by)


def test_a_key_given_twice_and_endless_aliases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="duplicate key seed"):
        load(tmp_path, "seed: 1\nseed: 2", by="file")
    with pytest.raises(UserError, match="recursive aliases"):
        load(tmp_path, "layers: &a [*a]", by="file")


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=9),
    st.from_regex(r"[-+0-9._:ebxo]{1,7}", fullmatch=True),
    st.sampled_from(["on", "No", "y", "~", "null", "1e3", "=", "<<"]),
)  # fmt: skip


@given(scalars)
def test_what_is_written_is_read_again(value: Any) -> None:
    written = yaml_values.dump({"a": value})
    assert yaml_values.read(written) == {"a": value}
    if not isinstance(value, float):  # 1e-05 is text in YAML 1.1
        assert yaml.safe_load(written) == {"a": value}
