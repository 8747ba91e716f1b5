"""Every loop on virtual ranks: dense on three, with a compressor of each family on two."""

from __future__ import annotations

import pytest

from tests.scripts.forms import Form, cases, run_threads
from tests.scripts.registry import Loop

CASES = cases(None)


@pytest.mark.parametrize(("loop", "form"), CASES, ids=[f"{loop.name}-{form.name}" for loop, form in CASES])
def test_loop(loop: Loop, form: Form) -> None:
    run_threads(loop, form)
