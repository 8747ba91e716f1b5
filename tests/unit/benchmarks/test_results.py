"""The committed results, and the index and the figure made from them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import index
from benchmarks.accuracy import convergence, recipe
from benchmarks.accuracy.runs import METRIC, Task
from benchmarks.common.options import RESULTS
from benchmarks.speed import plots

ALL = sorted(RESULTS.glob("*/*.json"))


def test_the_committed_index_is_the_generated_one() -> None:
    assert index.INDEX.read_text() == index.make_index(), "run `python -m benchmarks index`"


def test_every_result_is_in_the_index() -> None:
    links = set(re.findall(r"\]\(([^)]*)\.md\)", index.INDEX.read_text()))
    assert {str(path.relative_to(RESULTS).with_suffix("")) for path in ALL} <= links


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_result_has_a_table_with_its_command(path: Path) -> None:
    command = json.loads(path.read_text())["machine"]["command"]
    assert command in path.with_suffix(".md").read_text()


def test_documents_link_to_results_that_exist() -> None:
    missing = sorted(map(str, index.find_quotes().keys() - {path.with_suffix("") for path in ALL}))
    assert not missing


def test_the_figure_is_drawn_from_committed_results() -> None:
    assert all(path.exists() for path in plots.SOURCES)
    assert plots.FIGURE.exists()


@pytest.mark.parametrize("name", ["2026-11-22-digits-16-workers", "2026-11-22-text-more"])
def test_convergence_runs_give_the_committed_table(name: str) -> None:
    path = RESULTS / "convergence" / f"{name}.json"
    runs = json.loads(path.read_text())["runs"]
    task = Task.DIGITS if "digits" in name else Task.TEXT
    out = io.StringIO()
    rows = convergence.summarize_runs(runs, METRIC[task])
    Console(file=out, width=110).print(convergence.tabulate(rows, task.value, METRIC[task], 3))
    assert out.getvalue() in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("name", ["growing-digits", "large-text-contexts-of-3"])
def test_recipe_runs_give_the_committed_rows(name: str) -> None:
    path = RESULTS / "recipe" / f"2026-11-22-{name}.json"
    result = json.loads(path.read_text())
    task = Task.DIGITS if "digits" in name else Task.TEXT
    assert recipe.summarize_runs(result["runs"], METRIC[task]) == result["rows"]
