"""Every loop on real processes: under torch DDP and under disttrain. One launch for all cases of an engine."""

from __future__ import annotations

import functools

import pytest

from tests.scripts.forms import Form, cases
from tests.scripts.launches import case_name, run_all
from tests.scripts.registry import Loop

LAUNCHERS = ("torch", "mpi", "horovod-mpi")
CASES = [case for launcher in LAUNCHERS for case in cases(launcher)]

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(420)]


@functools.cache
def verdicts(launcher: str) -> dict[str, str | None]:
    return run_all([case for case in CASES if case[1].launcher == launcher], launcher)


@pytest.mark.parametrize(("loop", "form"), CASES, ids=[f"{loop.name}-{form.name}" for loop, form in CASES])
def test_loop(loop: Loop, form: Form) -> None:
    assert form.launcher is not None
    verdict = verdicts(form.launcher)[case_name((loop, form))]
    if verdict is not None and verdict.startswith("SKIPPED: "):
        pytest.skip(verdict.removeprefix("SKIPPED: "))
    assert verdict is None, verdict
