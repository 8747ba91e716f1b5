"""The bytes on the wire, by collective, compressor and parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from disttrain.collectives import (
    AllToAll,
    Collective,
    Group,
    Result,
    num_messages,
    received_bytes,
    sent_bytes,
    size_bytes,
)
from disttrain.comm.base import Communicator
from disttrain.compression import Bucket


@dataclass
class Traffic:
    """Bytes of one rank.

    Attributes:
        sent_bytes: bytes handed to the engine.
        received_bytes: bytes received from other ranks by the bandwidth-optimal algorithm.
        dense_bytes: bytes to hand over for the same gradients as dense float32.
        num_collectives: number of collectives.
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


@dataclass(frozen=True)
class Account:
    """What bytes are sent for: a bucket, by its index, and the compressor that exchanges it in this step."""

    compressor: str
    index: int | None = None
    bucket: Bucket | None = None

    def __str__(self) -> str:
        return self.compressor if self.index is None else f"bucket {self.index}: {self.compressor}"


AGREEMENT = Account("agreement")
"""Messages by which ranks agree, which hold no gradient."""


@dataclass(slots=True)
class Entry:
    """One collective of this rank.

    Attributes:
        account: what it is for.
        kind: "AllReduce", "AllGather", "AllToAll" or "Broadcast".
        group: the ranks that take part.
        dtype: of the data sent; packed payloads are uint8.
        sent_bytes, received_bytes: as in ``Traffic``. ``size_bytes`` of the bytes sent are sizes, exchanged first.
        num_messages: messages that this rank sends by the bandwidth-optimal algorithm.
    """

    account: Account
    kind: str
    group: Group
    dtype: torch.dtype
    sent_bytes: int
    received_bytes: int
    size_bytes: int
    num_messages: int


@dataclass
class Ledger:
    """Counts collectives, by step.

    Attributes:
        entries: the collectives of the last step, in the order in which they were started.
        last_step: the sum of ``entries``.
        total: the sum over all steps that have ended.
        by_compressor: the same by name of the compressor, and ``agreement``.
    """

    comm: Communicator
    entries: list[Entry] = field(default_factory=list)
    last_step: Traffic = field(default_factory=Traffic)
    total: Traffic = field(default_factory=Traffic)
    by_compressor: dict[str, Traffic] = field(default_factory=dict)
    _current: list[Entry] = field(default_factory=list)

    def record(
        self, collective: Collective, account: Account, world_size: int, rank: int
    ) -> Callable[[Result], Result]:
        """Count a collective that is about to be started, in a group of ``world_size`` ranks.

        Returns:
            A function to pass the result through when it arrives. It counts the bytes received.
        """
        tensor = collective.chunks[0] if isinstance(collective, AllToAll) else collective.tensor
        entry = Entry(
            account,
            type(collective).__name__,
            collective.group,
            tensor.dtype,
            sent_bytes(collective, world_size, rank),
            0,
            size_bytes(collective, world_size),
            num_messages(collective, world_size, rank),
        )
        self._current.append(entry)

        def count_received(result: Result) -> Result:
            entry.received_bytes = received_bytes(collective, result, world_size, rank)
            return result

        return count_received

    def end_step(self, num_elements: int) -> None:
        """End a step that exchanged gradients of ``num_elements`` elements."""
        self.entries, self._current = self._current, []
        self.last_step = Traffic(dense_bytes=self._dense_bytes(num_elements))
        seen = set()
        for entry in self.entries:
            traffic = Traffic(entry.sent_bytes, entry.received_bytes, num_collectives=1)
            self.last_step.add(traffic)
            if entry.account.bucket is not None and entry.account.index not in seen:
                seen.add(entry.account.index)
                traffic.dense_bytes = self._dense_bytes(entry.account.bucket.numel)
            self.by_compressor.setdefault(entry.account.compressor, Traffic()).add(traffic)
        self.total.add(self.last_step)

    def by_parameter(self) -> dict[str, Traffic]:
        """Return the bytes of the last step by parameter; those of a bucket are split by number of elements."""
        bytes_an_element = self._dense_bytes(1)
        shares: dict[str, Traffic] = {}
        for entry in self.entries:
            if (bucket := entry.account.bucket) is None:
                continue
            sent, received = (_share(total, bucket.numels) for total in (entry.sent_bytes, entry.received_bytes))
            for name, numel, *both in zip(bucket.names, bucket.numels, sent, received, strict=True):
                its = shares.setdefault(name, Traffic(dense_bytes=bytes_an_element * numel))
                its.add(Traffic(both[0], both[1], num_collectives=1))
        return shares

    def table(self) -> str:
        """Return the last step as text, one collective per line."""
        rows: list[tuple[str, ...]] = [("", "collective", "group", "dtype", "sent", "received", "sizes", "messages")]
        for entry in self.entries:
            numbers = (entry.sent_bytes, entry.received_bytes, entry.size_bytes, entry.num_messages)
            dtype = str(entry.dtype).removeprefix("torch.")
            rows.append((str(entry.account), entry.kind, entry.group, dtype, *(f"{number:,}" for number in numbers)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def _dense_bytes(self, num_elements: int) -> int:
        return 4 * num_elements if self.comm.world_size > 1 else 0


def _share(total: int, numels: Sequence[int]) -> list[int]:
    """Split ``total`` in proportion to ``numels``, into whole numbers whose sum is ``total``."""
    ends = [total * end // max(1, sum(numels)) for end in accumulate(numels)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
