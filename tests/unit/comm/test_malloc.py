"""Whether a process keeps the memory that it frees. Runs in subprocesses, since mallopt cannot be undone."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.support.workers import worker_environment

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")

# Allocates 48 MiB: more than glibc keeps by default.
FAULTS = """
import resource
import torch
import disttrain
def use():
    torch.empty(12 * 2**20).fill_(1.0)
def count():
    for _ in range(8):  # the heap grows at first, due to fragmentation
        use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        use()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = count()
disttrain.init("single", device="cpu")
print(before, count())
"""
PAGES = 48 * 2**20 // 4096


def page_faults(**env: str) -> int:
    """Count the page faults of four allocations after ``disttrain.init``. Skips if they cause few even before it."""
    inherited = {
        name: value for name, value in worker_environment().items() if not name.startswith(("MALLOC_", "GLIBC_"))
    }
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env={**inherited, **env}, capture_output=True, text=True, timeout=100, check=True)
    before, after = map(int, done.stdout.split())
    if before < PAGES:
        pytest.skip("pages are huge, or the allocator keeps memory by default")
    return after


def test_a_worker_keeps_freed_memory() -> None:
    assert page_faults() < PAGES // 100


@pytest.mark.parametrize(
    "settings", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=0"}]
)
def test_settings_of_the_user_take_precedence(settings: dict[str, str]) -> None:
    assert page_faults(**settings) >= PAGES
