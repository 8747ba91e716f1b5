"""Programs that just end, without ``close`` or a ``with`` block: the engine is left in good order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.workers import run_workers

pytestmark = pytest.mark.distributed

SCRIPT = """
import atexit, os, pathlib, sys

def at_the_end():  # registered first, so called last
    threads = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    left = {
        "torch": lambda: not any(name.startswith("gloo") for name in threads),
        "horovod": lambda: not __import__("horovod.torch").torch.is_initialized(),
        "mpi": lambda: comm._thread._shutdown,
    }[comm.engine]()
    os.write(1, f"rank {comm.rank}: left {left}\\n".encode())

atexit.register(at_the_end)
import torch, disttrain
torch.set_num_threads(1)
comm = disttrain.init(os.environ["ENGINE"], "cpu", guard="guarded" in sys.argv)
model = torch.nn.Linear(8, 8)
optimizer = disttrain.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
if "uneven" in sys.argv and comm.rank == 1:
    optimizer.zero_grad()
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize("guard", ["guarded", "alone"])
@pytest.mark.parametrize("launcher", ["torch", "horovod-gloo", "mpi"])
def test_the_end_of_a_program_leaves_the_engine(launcher: str, guard: str, script: Path) -> None:
    done = run_workers(launcher, 2, [script, guard])
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank \d: left \w+", done.stdout)) == ["rank 0: left True", "rank 1: left True"]


@pytest.mark.parametrize("launcher", ["torch", "horovod-gloo", "mpi"])
def test_a_rank_that_finishes_after_fewer_steps_is_named(launcher: str, script: Path) -> None:
    done = run_workers(launcher, 2, [script, "guarded", "uneven"])
    assert done.returncode != 0
    lines = re.findall(r"error: (rank 0 \(.*)", done.stderr)
    assert len(lines) == 1, done.stderr
    assert re.match(
        r"rank 0 \(.*\) has finished; rank 1 is waiting in all_reduce \d \(.*\) of step 4: give all ranks", lines[0]
    )
    assert "Connection closed" not in done.stderr.partition("has finished")[0]
