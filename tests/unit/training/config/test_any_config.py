"""For any config or command line: a plan that can be run, or exit code 2 and one line.

``make fuzz`` draws ten thousand; the default is a few.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from disttrain import batching, compression
from disttrain.optim.optimizers.sections import optimizers
from disttrain.optim.schedules import schedules
from disttrain.training.config import Config, from_dict
from disttrain.validation import keys_of
from tests.support.workers import ROOT
from tests.unit.cli.test_cli import call

NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "75"))
pytestmark = pytest.mark.timeout(100 + NUM_EXAMPLES)
FILES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.name != "minilm.yaml")  # its task is an extra
REGISTRIES = {
    "compressor": compression.registry, "optimizer": optimizers, "schedule": schedules, "batch": batching.registry
}  # fmt: skip
KEYS = sorted(
    {*keys_of(Config), *(f"{key}.name" for key in REGISTRIES)}
    | {
        f"{key}.{inner}"
        for key, registry in REGISTRIES.items()
        for name in registry.names()
        for inner in keys_of(registry.get(name))
    }
)
NAMES = sorted({name for registry in REGISTRIES.values() for name in registry.names()} | {"digits", "text"})
ODD = [
    "", "null", "true", "???", "${seed}", "${nowhere}", "${oc.env:HOME}", "${name",
    "!!python/object/apply:os.getcwd []", "!!binary x", "&a [*a]", "[", "{a: b", "[[[[]]]]", "{}", "{name: {}}",
    "[{match: '*'}]", "[{match: '*', use: topk}]", "[1, 2, 3]", "1e400", "-1e400", ".nan", ".inf", "0x10", "1_000",
    "2024-01-01", "a: b", "ä", "\0", "\n", "../..", "/", "nowhere:Nothing", "json:JSONDecoder", ":", "a.b.c",
    "[constant, cosine]", "[{name: cosine}, constant]", "1:30",
]  # fmt: skip

scalars = st.one_of(
    st.sampled_from(ODD),
    st.sampled_from(NAMES),
    st.integers(-3, 300).map(str),
    st.integers().map(str),
    st.floats(0, 1).map(str),
    st.floats().map(str),
    st.text(max_size=12),
)
overrides = st.one_of(
    st.tuples(st.sampled_from(KEYS), scalars).map("=".join),
    st.tuples(st.sampled_from([f"{key}.name" for key in REGISTRIES]), st.sampled_from(NAMES)).map("=".join),
    st.tuples(st.text(max_size=10), scalars).map("=".join),
    st.tuples(st.sampled_from(KEYS), st.sampled_from(["", ".", ".x", "[0]", " "]), scalars).map(
        lambda t: f"{t[0]}{t[1]}={t[2]}"
    ),
    st.text(max_size=12).filter(lambda text: not text.startswith("-")),
)
no_fixture_is_changed = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=NUM_EXAMPLES <= 1000,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Calls the command line: its exit code and what it wrote, once that has been found in order."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.chdir(tmp_path)

    def end(*arguments: str) -> tuple[int, str]:
        code = call(*arguments)
        output, errors = capsys.readouterr()
        assert code in (0, 2), errors
        lines = [line for line in errors.split("\n") if line and not line.startswith("INFO: task.name=")]
        if code == 2:
            assert len(lines) == 1, errors
            assert re.match(r"error: \S.{5}", lines[0]), errors
            assert output == ""
        else:
            assert lines == []
        return code, output

    return end


def check_plan(output: str) -> None:
    """The printed config is complete: loading it gives the same preview."""
    plan = yaml.safe_load(output)
    assert from_dict(plan).to_dict() == plan


@no_fixture_is_changed
@example(file=FILES[0], drawn=["compressor.name=topk", "compressor.ratio=0.01"], workers=2)
@given(st.sampled_from(FILES), st.lists(overrides, max_size=4), st.integers(1, 9))
def test_any_overrides(ended, file: Path, drawn: list[str], workers: int) -> None:
    code, output = ended("config", str(file), *drawn, "--workers", str(workers))
    if code == 0:
        check_plan(output)


@st.composite
def changed_files(draw: st.DrawFn) -> bytes:
    """A config with lines left out, doubled, moved, or with something else in them."""
    lines = draw(st.sampled_from(FILES)).read_text().splitlines()
    lines = [line for line in lines if not line.lstrip().startswith("#")]
    for _ in range(draw(st.integers(1, 4))):
        index = draw(st.integers(0, len(lines) - 1)) if lines else 0
        match draw(st.sampled_from(["drop", "double", "value", "indent", "text", "cut"])):
            case "drop":
                del lines[index : index + 1]
            case "double":
                lines[index:index] = lines[index : index + 1]
            case "value" if lines:
                lines[index] = f"{lines[index].partition(':')[0]}: {draw(scalars)}"
            case "indent" if lines:
                lines[index] = f"  {lines[index]}"
            case "text":
                lines.insert(index, draw(st.text(max_size=20)))
            case "cut" if lines:
                lines[index] = lines[index][: draw(st.integers(0, len(lines[index])))]
    content = "\n".join(lines).encode(errors="surrogatepass")
    return content if draw(st.integers(0, 9)) else content + draw(st.binary(max_size=8))


@no_fixture_is_changed
@given(changed_files())
def test_any_file(ended, content: bytes) -> None:
    Path("drawn.yaml").write_bytes(content)
    code, output = ended("config", "drawn.yaml")
    if code == 0:
        check_plan(output)


words = st.one_of(
    st.sampled_from(
        ["config", "conifg", "--workers", "--debugg", "--workers=2", "2", "0", "-1", "x", "--", "-n", "--nodes"]
    ),
    st.sampled_from([str(file) for file in FILES]),
    overrides,
    st.text(max_size=8),
)


@no_fixture_is_changed
@given(st.lists(words, min_size=1, max_size=5))
def test_any_command_line(ended, arguments: list[str]) -> None:
    ended("config", *arguments)


@no_fixture_is_changed
@given(st.lists(words.filter(lambda word: not word.startswith("-")), max_size=3))
def test_any_command(ended, arguments: list[str]) -> None:
    ended("confgi", *arguments)
