"""What the process does with memory that it frees. In processes of their own, since an allocator cannot be set back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.support.workers import worker_environment

pytestmark = [
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told"),
    pytest.mark.xdist_group("memory"),  # the fixture costs a process
]

# 48 MiB: more than glibc ever keeps by itself.
FAULTS = """
import resource, sys
import torch
import disttrain
if sys.argv[1] == "init":
    disttrain.init("single", device="cpu")
def use():
    torch.empty(12 * 2**20).fill_(1.0)
for _ in range(30):  # at first the heap grows, as blocks do not fit where others were
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 48 * 2**20 // 4096


def page_faults(how: str, **env: str) -> int:
    plain = {name: value for name, value in worker_environment().items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS, how]
    done = subprocess.run(command, env={**plain, **env}, capture_output=True, text=True, timeout=100, check=True)
    return int(done.stdout)


@pytest.fixture(scope="module", autouse=True)
def _skip_where_nothing_can_be_seen() -> None:
    if page_faults("not") < PAGES:
        pytest.skip("pages are huge here, or the allocator keeps memory anyway")


def test_a_worker_keeps_what_it_frees() -> None:
    assert page_faults("init") < PAGES // 100


@pytest.mark.parametrize("own", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=0"}])
def test_who_sets_the_allocator_is_left_in_charge(own: dict[str, str]) -> None:
    assert page_faults("init", **own) >= PAGES
