"""``python -m tests.scripts [WORD ...]``: the table of loops and forms, or of those whose names contain a WORD."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tests.scripts.forms import FORMS, Form, cases, run_threads
from tests.scripts.judge import DifferenceError
from tests.scripts.launches import case_name, run_all
from tests.scripts.registry import Loop, load


def main(words: Sequence[str]) -> int:
    begin, verdicts = time.monotonic(), {}
    for launcher in (None, "torch", "mpi", "horovod-mpi"):
        chosen = [case for case in cases(launcher) if not words or any(word in case_name(case) for word in words)]
        if launcher is not None:
            verdicts.update(run_all(chosen, launcher))
            continue
        for loop, form in chosen:
            verdicts[case_name((loop, form))] = _verdict(loop, form)
    shown = [name for name in load() if any(f"{name}@{form}" in verdicts for form in FORMS)]
    width = max(map(len, shown), default=0)
    print(" " * width, *FORMS)
    for name in shown:
        cells = [_cell(verdicts, f"{name}@{form}").center(len(form)) for form in FORMS]
        print(f"{name:{width}}", *cells)
    _explain(verdicts)
    wrong = sum(verdict is not None and not verdict.startswith("SKIPPED") for verdict in verdicts.values())
    print(f"{len(shown)} loops, {len(verdicts)} cases, {wrong} wrong, {time.monotonic() - begin:.0f} s")
    return int(wrong > 0)


def _verdict(loop: Loop, form: Form) -> str | None:
    try:
        run_threads(loop, form)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _explain(verdicts: dict[str, str | None]) -> None:
    """Print each error once for all forms of a loop that have it."""
    forms: dict[tuple[str, str], list[str]] = {}
    for case, verdict in verdicts.items():
        if verdict is not None:
            name, form = case.split("@")
            line = verdict.splitlines()[0].removeprefix("rank 0: ")[:200]
            forms.setdefault((name, line), []).append(form)
    for (name, line), its in sorted(forms.items()):
        print(f"{name} ({', '.join(its)}): {line}")


def _cell(verdicts: dict[str, str | None], name: str) -> str:
    if name not in verdicts:
        return "."
    verdict = verdicts[name]
    if verdict is None:
        return "ok"
    if verdict.startswith("SKIPPED"):
        return "skip"
    return "diff" if verdict.startswith(DifferenceError.__name__) else "err"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
