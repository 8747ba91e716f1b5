"""Compiled loops run even if the folder for their cache cannot be used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba")

from numba.core import config
from numba.core.caching import FunctionCache

from disttrain.kernels.cpu import compiling


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiling, "_warned", [])
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))  # empty, so that loops are compiled and saved


def run_two() -> None:
    @compiling.compiled()
    def double(number: int) -> int:
        return 2 * number

    @compiling.compiled()
    def triple(number: int) -> int:
        return 3 * number

    assert (double(3), triple(3)) == (6, 9)


def fail(error: Exception) -> Any:
    def failing(*arguments: Any) -> None:
        raise error

    return failing


def test_without_a_place_for_a_cache_loops_run_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FunctionCache, "__init__", fail(RuntimeError("cannot cache function: no locator available")))
    run_two()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "set NUMBA_CACHE_DIR to a folder that can be written to" in caplog.text
    assert compiling.report().endswith("set NUMBA_CACHE_DIR to a folder that can be written to")


@pytest.mark.parametrize("method", ["_load_overload", "_save_overload"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "no"), EOFError("cut")])
def test_a_cache_that_fails_is_not_used_any_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str, error: Exception
) -> None:
    monkeypatch.setattr(FunctionCache, method, fail(error))
    run_two()
    assert len(caplog.records) == 1
    assert type(error).__name__ in caplog.text
    assert "NUMBA_CACHE_DIR" in caplog.text


def test_loops_are_cached_where_they_can_be(caplog: pytest.LogCaptureFixture) -> None:
    run_two()
    assert not caplog.records
    assert compiling.report().startswith("compiled loops are kept in ")
