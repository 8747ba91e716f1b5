from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore, Store

from disttrain.comm.launch.attempt_store import attempt_store


def meet(store: Store, world_size: int) -> list[str]:
    """What each rank reads of rank 0's word, after all have met."""

    def join(rank: int) -> str:
        part = attempt_store(store, rank, world_size, 20)
        if rank == 0:
            part.set("word", f"of {world_size}")
        return str(part.get("word").decode())

    with ThreadPoolExecutor(world_size) as pool:
        return [*pool.map(join, reversed(range(world_size)))]


def test_each_attempt_has_a_part_of_its_own_whatever_the_dead_have_left() -> None:
    store = HashStore()
    store.set("disttrain/caller/1", "dead")  # it called, and was killed before anybody answered
    for world_size in (3, 2, 3, 4):
        assert meet(store, world_size) == [f"of {world_size}"] * world_size


def test_a_rank_that_does_not_come_is_named() -> None:
    store = HashStore()
    store.set("disttrain/caller/1", "dead")
    with pytest.raises(TimeoutError, match=r"timed out: ranks \[1\] did not join"):
        attempt_store(store, 0, 2, 0.1)
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(Exception, match=r"(?i)time"):
        attempt_store(store, 1, 2, 0.1)
