"""One contract for all communicators: virtual ranks, and real processes under every launcher."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from disttrain.comm import SingleProcess, simulate
from disttrain.comm.launch.nodes import NODE_SIZE
from tests.contract.communicator_checks import CHECKS
from tests.support.workers import LAUNCHERS, run_workers, unavailable

GROUP_CHECKS = [name for name in CHECKS if name.startswith("groups")]
SCRIPT = Path(__file__).with_name("communicator_checks.py")


@pytest.mark.parametrize("check", CHECKS)
def test_single(check: str) -> None:
    CHECKS[check](SingleProcess())


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_simulated(world_size: int, check: str) -> None:
    simulate(world_size, CHECKS[check])


@pytest.mark.parametrize("check", GROUP_CHECKS)
@pytest.mark.parametrize(("world_size", "local_size"), [(4, 2), (6, 3), (8, 2), (3, 1), (3, 3)])
def test_groups_of_simulated_nodes(world_size: int, local_size: int, check: str) -> None:
    simulate(world_size, CHECKS[check], local_size=local_size)


@pytest.mark.parametrize("check", CHECKS)
def test_simulated_in_turns(check: str) -> None:
    simulate(4, CHECKS[check], local_size=2 if check in GROUP_CHECKS else None, in_turns=True)


@functools.cache
def outcomes(launcher: str, world_size: int) -> dict[str, str]:
    """One launch runs all checks: what went wrong in each, or an empty string.

    Of four ranks two are a node, though they share a machine: then both groups have several members.
    """
    env = {NODE_SIZE: "2", "HOROVOD_DYNAMIC_PROCESS_SETS": "1"} if world_size == 4 else {}
    done = run_workers(launcher, world_size, [SCRIPT], **env)
    lines = [line.partition("CHECK ")[2] for line in done.stdout.splitlines() if "CHECK " in line]
    assert lines, f"no check was run; exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return {**dict(json.loads(line) for line in lines), "exit code": str(done.returncode), "log": done.stderr[-4000:]}


# Horovod's engine is the same over gloo and MPI but for who carries it: of the latter, four ranks will do.
LAUNCHES = [(launcher, size) for launcher in LAUNCHERS for size in (2, 3, 4) if launcher != "horovod-mpi" or size == 4]


@pytest.mark.distributed
@pytest.mark.parametrize("check", [*CHECKS, "exit code"])
@pytest.mark.parametrize(("launcher", "world_size"), LAUNCHES)
def test_real_processes(launcher: str, world_size: int, check: str) -> None:
    reason = unavailable(launcher)
    if reason is not None:
        pytest.skip(reason)
    result = outcomes(launcher, world_size)
    assert check in result, f"the launch ended before this check\n{result['log']}"
    assert result[check] == ("0" if check == "exit code" else ""), result[check]
