"""A store of torchrun's that holds nothing of earlier attempts.

torchrun's agent keeps one store while it restarts workers and hosts join and go. What the dead have left there (the
addresses at which gloo reached them) must not be taken for the living, and nothing that torchrun tells all workers
distinguishes one attempt from the next. So rank 0 names the attempt, and tells those that prove to be alive.
"""

from __future__ import annotations

import secrets
import time

from torch._C._distributed_c10d import PrefixStore, Store

_POLL_SECONDS = 0.01


def attempt_store(store: Store, rank: int, world_size: int, timeout: float) -> Store:
    """The part of ``store`` that is this attempt's alone. All ranks call it together.

    Raises:
        TimeoutError: on rank 0, some ranks did not come within ``timeout`` seconds.
        DistError: on the others, rank 0 did not.
    """
    meeting, own = PrefixStore("disttrain", store), secrets.token_hex(8)
    if rank > 0:
        meeting.set(f"caller/{rank}", own)
        attempt = meeting.get(f"attempt/{own}").decode()  # waits
        meeting.set(f"{attempt}/{rank}", "here")
        return PrefixStore(attempt, store)
    missing, answered, deadline = set(range(1, world_size)), set(), time.monotonic() + timeout
    while missing:
        for other in sorted(missing):
            if meeting.check([f"{own}/{other}"]):
                missing.discard(other)
            elif meeting.check([f"caller/{other}"]) and (caller := meeting.get(f"caller/{other}")) not in answered:
                meeting.set(f"attempt/{caller.decode()}", own)  # it may be a dead one's call: the living's will follow
                answered.add(caller)
        if time.monotonic() > deadline:
            raise TimeoutError(f"timed out: ranks {sorted(missing)} did not come")
        time.sleep(_POLL_SECONDS)
    return PrefixStore(own, store)
