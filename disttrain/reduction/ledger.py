"""The bytes on the wire, counted in one place: where a collective is started."""

from __future__ import annotations

from dataclasses import dataclass

from disttrain.collectives import Collective, Result, received_bytes, sent_bytes
from disttrain.comm.base import Communicator, Pending, Work


@dataclass
class Traffic:
    """Bytes of one rank.

    Attributes:
        sent_bytes: what this rank handed to the engine.
        received_bytes: what reached it from others, by the cost of the bandwidth-optimal algorithm.
        dense_bytes: what it would have handed over had the same gradients travelled as dense float32.
        num_collectives: how many collectives that took.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    dense_bytes: int = 0
    num_collectives: int = 0

    def add(self, other: Traffic) -> None:
        self.sent_bytes += other.sent_bytes
        self.received_bytes += other.received_bytes
        self.dense_bytes += other.dense_bytes
        self.num_collectives += other.num_collectives


class Ledger:
    """Starts collectives and keeps account of them: ``last_step``, and ``total`` over all steps that have ended."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._current = Traffic()
        self.last_step = Traffic()
        self.total = Traffic()

    def start(self, collective: Collective, *, priority: bool = False) -> Work[Result]:
        group = self._comm.group(collective.group)
        rank, world_size = group.rank, group.world_size
        work = self._comm.start(collective, priority=priority)
        self._current.num_collectives += 1
        self._current.sent_bytes += sent_bytes(collective, world_size, rank)

        def finish() -> Result:
            result = work.wait()
            self._current.received_bytes += received_bytes(collective, result, world_size, rank)
            return result

        return Pending(finish)

    def end_step(self, num_elements: int) -> None:
        """Close the account of a step that exchanged gradients of ``num_elements`` elements."""
        self._current.dense_bytes = 4 * num_elements if self._comm.world_size > 1 else 0
        self.last_step, self._current = self._current, Traffic()
        self.total.add(self.last_step)
