from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore, Store

from disttrain.comm.launch.attempt_store import attempt_store


def run_attempt(store: Store, world_size: int) -> list[str]:
    """Return what each rank reads from the key that rank 0 sets in the attempt's store."""

    def join(rank: int) -> str:
        attempt = attempt_store(store, rank, world_size, 20)
        if rank == 0:
            attempt.set("key", f"of {world_size}")
        return str(attempt.get("key").decode())

    with ThreadPoolExecutor(world_size) as pool:
        return [*pool.map(join, reversed(range(world_size)))]


def test_attempts_do_not_see_keys_of_earlier_attempts() -> None:
    store = HashStore()
    store.set("disttrain/caller/1", "dead")  # of a rank that was killed before rank 0 answered
    for world_size in (3, 2, 3, 4):
        assert run_attempt(store, world_size) == [f"of {world_size}"] * world_size


def test_a_rank_that_does_not_join_is_named() -> None:
    store = HashStore()
    store.set("disttrain/caller/1", "dead")
    with pytest.raises(TimeoutError, match=r"timed out: ranks \[1\] did not join"):
        attempt_store(store, 0, 2, 0.1)
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(Exception, match=r"(?i)time"):
        attempt_store(store, 1, 2, 0.1)
