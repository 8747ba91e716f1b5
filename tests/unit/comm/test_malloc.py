"""What the process does with memory that it frees. In processes of their own, since an allocator cannot be set back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.support.workers import worker_environment

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")

# 48 MiB: more than glibc ever keeps by itself.
FAULTS = """
import resource
import torch
import disttrain
def use():
    torch.empty(12 * 2**20).fill_(1.0)
def count():
    for _ in range(8):  # at first the heap grows, as blocks do not fit where others were
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
    """Of four uses after ``disttrain.init``; before it, each must have cost some."""
    plain = {name: value for name, value in worker_environment().items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env={**plain, **env}, capture_output=True, text=True, timeout=100, check=True)
    before, after = map(int, done.stdout.split())
    if before < PAGES:
        pytest.skip("pages are huge here, or the allocator keeps memory anyway")
    return after


def test_a_worker_keeps_what_it_frees() -> None:
    assert page_faults() < PAGES // 100


@pytest.mark.parametrize("own", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=0"}])
def test_who_sets_the_allocator_is_left_in_charge(own: dict[str, str]) -> None:
    assert page_faults(**own) >= PAGES
