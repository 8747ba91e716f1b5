"""Real processes for the loops: one launch runs all cases; if a case ends it, another continues after that case."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from tests.scripts.forms import Form, Outcome, judge
from tests.scripts.registry import Loop
from tests.scripts.worker import CASE_LIMIT
from tests.support.workers import LAUNCHERS, ROOT, kill_tree, unavailable, worker_environment

LAUNCHES = 6  # of one kind, at most, before what is left is reported as not run
LAUNCH_LIMIT = 400.0  # seconds for all launches of one kind
QUIET_LIMIT = 150.0  # seconds without a sign of life, from the start on, after which a launch is ended

Case = tuple[Loop, Form]


def case_name(case: Case) -> str:
    return f"{case[0].name}@{case[1].name}"


def run_all(cases: Sequence[Case], launcher: str) -> dict[str, str | None]:
    """Return by case None if it is right, else what is wrong."""
    if not cases:
        return {}
    reason = unavailable(launcher)
    if reason is not None:
        return dict.fromkeys(map(case_name, cases), f"SKIPPED: {reason}")
    verdicts: dict[str, str | None] = {}
    left, deadline = list(cases), time.monotonic() + LAUNCH_LIMIT
    for _ in range(LAUNCHES):
        done = _launch(left, launcher, deadline)
        verdicts.update(done)
        left = [case for case in left if case_name(case) not in verdicts]
        if not left or not done or time.monotonic() > deadline:
            break
    return verdicts | {case_name(case): "not run: launches before it were ended too often" for case in left}


def _launch(cases: Sequence[Case], launcher: str, deadline: float) -> dict[str, str | None]:
    """Return verdicts on the cases that were run, and on the one that ended the launch."""
    world_size = cases[0][1].world_size
    start, engine, _, _ = LAUNCHERS[launcher]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cases.json").write_text(json.dumps([case_name(case) for case in cases]))
        command = [*start(world_size), "-m", "tests.scripts.worker", str(folder)]
        with (folder / "log").open("w+") as log:
            # Without the quick start's path: DDP and torch.compile need the modules that it leaves out.
            env = worker_environment(ENGINE=engine, PYTHONPATH=str(ROOT))
            _watch(command, env, folder, log, deadline)
            log.seek(0)
            text = log.read()
        verdicts = {}
        for case in cases:
            if not any(folder.glob(f"{case_name(case)}.started.*")):
                break
            is_done = len(list(folder.glob(f"{case_name(case)}.done.*"))) == world_size
            verdicts[case_name(case)] = _verdict(case, folder, text, world_size)
            if not is_done:
                break  # some ranks may have begun the next one, which is not to blame
        return verdicts


def _watch(command: list[str], env: dict[str, str], folder: Path, log: IO[str], deadline: float) -> None:
    """Run a launch to its end, or end it when it hangs."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=ROOT, start_new_session=True
    )
    try:
        while process.poll() is None:
            if time.time() - folder.stat().st_mtime > QUIET_LIMIT or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        kill_tree(process.pid)
        process.wait()


def _verdict(case: Case, folder: Path, log: str, world_size: int) -> str | None:
    name = case_name(case)
    records: list[Outcome | str] = []
    for rank in range(world_size):
        path = folder / f"{name}.done.{rank}"
        records.append(torch.load(path, weights_only=False) if path.exists() else _ended(rank, log))
    errors = [f"rank {rank}: {record}" for rank, record in enumerate(records) if isinstance(record, str)]
    if errors:
        return "\n".join(sorted(errors, key=_is_echo))
    try:
        judge(*case, [record for record in records if isinstance(record, Outcome)])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _ended(rank: int, log: str) -> str:
    if "Timeout (" in log:
        stacks = log[log.index("Timeout (") :]
        return f"took longer than {CASE_LIMIT:g} s, and was ended:\n{stacks[:3000]}"
    return f"the process ended, or was ended when it gave no sign of life:\n{log[-3000:]}"


def _is_echo(error: str) -> bool:
    """Whether a rank reports that another one has left, which explains less than the other's own error."""
    return bool(re.search(r"Connection closed|Connection reset|Timed out|the process ended|BrokenPipe", error))
