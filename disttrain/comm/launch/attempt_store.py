"""A part of torchrun's store that holds nothing from earlier attempts.

torchrun's agent keeps the same store while it restarts workers, and while hosts join and leave. Workers must not read
what earlier workers left there, such as the addresses of their gloo connections. But torchrun tells workers nothing
that distinguishes one attempt from the next. Rank 0 therefore picks a random name for the attempt, and passes it to
each rank that answers.
"""

from __future__ import annotations

import secrets
import time

from torch._C._distributed_c10d import PrefixStore, Store

_POLL_SECONDS = 0.01


def attempt_store(store: Store, rank: int, world_size: int, timeout: float) -> Store:
    """Return a view of ``store`` that only this attempt uses. All ranks must call it.

    Raises:
        TimeoutError: on rank 0: some ranks did not join within ``timeout`` seconds.
        DistError: on other ranks: rank 0 did not answer within the store's timeout.
    """
    meeting, own = PrefixStore("disttrain", store), secrets.token_hex(8)
    if rank > 0:
        meeting.set(f"caller/{rank}", own)
        attempt = meeting.get(f"attempt/{own}").decode()  # blocks until rank 0 answers
        meeting.set(f"{attempt}/{rank}", "here")
        return PrefixStore(attempt, store)
    missing, answered, deadline = set(range(1, world_size)), set(), time.monotonic() + timeout
    while missing:
        for other in sorted(missing):
            if meeting.check([f"{own}/{other}"]):
                missing.discard(other)
            elif meeting.check([f"caller/{other}"]) and (caller := meeting.get(f"caller/{other}")) not in answered:
                # The caller may be from an earlier attempt. Then the current one will overwrite the key.
                meeting.set(f"attempt/{caller.decode()}", own)
                answered.add(caller)
        if time.monotonic() > deadline:
            raise TimeoutError(f"timed out: ranks {sorted(missing)} did not join")
        time.sleep(_POLL_SECONDS)
    return PrefixStore(own, store)
