"""Every loop in real processes, under torch DDP and under disttrain. One launch runs all cases of an engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.scripts.forms import Form, cases
from tests.scripts.launches import case_name, run_all
from tests.scripts.registry import Loop

CASES = [case for launcher in ("torch", "mpi", "horovod-mpi") for case in cases(launcher)]

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def verdict_on(request: pytest.FixtureRequest) -> Callable[[Loop, Form], str | None]:
    """Return the verdict on a case. The first call for a launcher runs all of its selected cases."""
    params = [item.callspec.params for item in request.session.items if item.path == request.path]
    verdicts: dict[str, dict[str, str | None]] = {}

    def ask(loop: Loop, form: Form) -> str | None:
        assert form.launcher is not None
        if form.launcher not in verdicts:
            selected = [(p["loop"], p["form"]) for p in params if p["form"].launcher == form.launcher]
            verdicts[form.launcher] = run_all(selected, form.launcher)
        return verdicts[form.launcher][case_name((loop, form))]

    return ask


@pytest.mark.parametrize(("loop", "form"), CASES, ids=[f"{loop.name}-{form.name}" for loop, form in CASES])
def test_loop(loop: Loop, form: Form, verdict_on: Callable[[Loop, Form], str | None]) -> None:
    verdict = verdict_on(loop, form)
    if verdict is not None and verdict.startswith("SKIPPED: "):
        pytest.skip(verdict.removeprefix("SKIPPED: "))
    assert verdict is None, verdict
