"""How far a run has come, and how many bytes its workers have sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import TypeAdapter

from disttrain.reduction import Ledger

WIRE = ("sent_bytes", "received_bytes", "dense_bytes")


@dataclass
class Progress:
    """Counts of a run's steps and samples, and its position in the data.

    Attributes:
        step: optimizer steps, including skipped ones.
        epoch: complete epochs.
        offset: samples of the current epoch that have been used, over all ranks.
        samples: samples that have been used in total.
        skipped_steps: optimizer steps that were skipped.
        seconds: duration of the run.
        step_seconds: duration of its steps, without evaluation and saving.
        num_samples: samples in an epoch of the current data.
    """

    step: int = 0
    epoch: int = 0
    offset: int = 0
    samples: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    num_samples: int = 1

    @classmethod
    def parse(cls, state: Mapping[str, Any]) -> Progress:
        """Return the saved progress. Unknown keys are ignored.

        Raises:
            ValueError: a value is missing, has the wrong type or is negative.
        """
        saved = TypeAdapter(cls).validate_python(state)
        if min(saved.step, saved.epoch, saved.offset, saved.samples) < 0:
            raise ValueError("the saved progress has negative counts")
        return saved

    @property
    def epochs(self) -> float:
        """Epochs done, including the fraction of the current one."""
        return self.epoch + self.offset / self.num_samples

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load everything but ``num_samples``, which describes the current data."""
        saved = asdict(self.parse(state))
        for name in saved.keys() - {"num_samples"}:
            setattr(self, name, saved[name])


class WireTotals:
    """Bytes that an average worker has sent and received since the run started, before and after it was resumed."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._before: Mapping[str, Any] = dict.fromkeys(WIRE, 0)

    def compute(self) -> dict[str, Any]:
        """Return the totals, and under ``by_compressor`` those of each compressor. A collective."""
        ledger, comm = self._ledger, self._ledger.comm
        parts = {"": ledger.total, **dict(sorted(ledger.by_compressor.items()))}  # in the same order on all ranks
        rows = [[getattr(traffic, key) for key in WIRE] for traffic in parts.values()]
        means = (comm.all_reduce(torch.tensor(rows, device=comm.device)) // comm.world_size).tolist()
        now = {name: dict(zip(WIRE, row, strict=True)) for name, row in zip(parts, means, strict=True)}
        earlier = {"": self._before, **self._before.get("by_compressor", {})}
        sums = {
            name: {key: sum(part[name][key] for part in (earlier, now) if name in part) for key in WIRE}
            for name in {**earlier, **now}
        }
        return {**sums.pop(""), "by_compressor": sums}

    def state_dict(self) -> dict[str, Any]:
        """Return the totals. A collective."""
        return self.compute()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._before = {**dict.fromkeys(WIRE, 0), **state}
