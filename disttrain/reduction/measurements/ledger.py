"""The bytes on the wire, counted in one place: where a collective is started."""

from __future__ import annotations

from collections.abc import Sequence
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
from disttrain.comm.work import Work
from disttrain.compression import Bucket


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


@dataclass(frozen=True)
class Account:
    """Whose bytes they are: a bucket's, by its index, and the compressor's that exchanges it in this step."""

    compressor: str
    index: int | None = None
    bucket: Bucket | None = None

    def __str__(self) -> str:
        return self.compressor if self.index is None else f"bucket {self.index}: {self.compressor}"


AGREEMENT = Account("agreement")
"""What is no gradient: the flags that ranks agree on."""


@dataclass(slots=True)
class Entry:
    """One collective of this rank.

    Attributes:
        account: whose it is.
        kind: "AllReduce", "AllGather", "AllToAll" or "Broadcast".
        group: the ranks that it is addressed to.
        dtype: of what travels; packed payloads are uint8.
        sent_bytes, received_bytes: as in ``Traffic``. ``size_bytes`` of those sent are sizes, exchanged first.
        num_messages: messages that this rank sends, by the bandwidth-optimal algorithm.
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
    """Starts collectives and keeps account of them.

    Attributes:
        entries: of the last step, in the order in which they were started.
        last_step: their sum.
        total: that of all steps that have ended.
        by_compressor: the same by the compressor's name; beside them ``agreement``.
    """

    comm: Communicator
    entries: list[Entry] = field(default_factory=list)
    last_step: Traffic = field(default_factory=Traffic)
    total: Traffic = field(default_factory=Traffic)
    by_compressor: dict[str, Traffic] = field(default_factory=dict)
    _current: list[Entry] = field(default_factory=list)

    def start(
        self, collective: Collective, account: Account = AGREEMENT, comm: Communicator | None = None
    ) -> Work[Result]:
        """Start a collective on ``comm``, by default the ledger's own, and return at once."""
        comm = comm or self.comm
        group = comm.group(collective.group)
        rank, world_size = group.rank, group.world_size
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

        return comm.start(collective, account=account).then(count_received)

    def end_step(self, num_elements: int) -> None:
        """Close the account of a step that exchanged gradients of ``num_elements`` elements."""
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
        """The last step's bytes by parameter: those of a bucket shared out by number of elements, exactly."""
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
        """The last step as text, one collective a line."""
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
    """``total`` in proportion to ``numels``; whole numbers whose sum is ``total``."""
    ends = [total * end // max(1, sum(numels)) for end in accumulate(numels)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
