"""Virtual ranks that compute one at a time (``in_turns``)."""

from __future__ import annotations

import time

import pytest
import torch

from disttrain.comm import Communicator, simulate


def test_in_turns_only_one_rank_computes_at_a_time() -> None:
    computing: list[int] = []

    def run(comm: Communicator) -> list[float]:
        sums = []
        for step in range(5):
            computing.append(comm.rank)
            time.sleep(0.001)
            assert computing == [comm.rank]
            computing.clear()
            sums.append(comm.all_reduce(torch.tensor(float(comm.rank + step)), "sum").item())
        return sums

    assert simulate(6, run, in_turns=True) == [[15 + 6 * step for step in range(5)]] * 6


def test_in_turns_a_failure_ends_all_ranks() -> None:
    def run(comm: Communicator) -> None:
        comm.all_reduce(torch.ones(1), "sum")
        if comm.rank == 1:
            raise ValueError("rank 1 fails")
        comm.all_reduce(torch.ones(1), "sum")

    with pytest.raises(ValueError, match="rank 1 fails"):
        simulate(3, run, in_turns=True, timeout=20)


def test_in_turns_a_deadlock_is_reported() -> None:
    def run(comm: Communicator) -> None:
        if comm.rank > 0:
            comm.all_reduce(torch.ones(1), "sum")

    with pytest.raises(RuntimeError, match=r"ranks \[0\] never started collective 0"):
        simulate(3, run, in_turns=True, timeout=0.3)
