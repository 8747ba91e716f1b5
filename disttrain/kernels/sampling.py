"""What is estimated from a sample: a threshold, and how many entries to expect above it; a mean square."""

from __future__ import annotations

import torch

RUN = 16  # neighbors that are sampled together: one cache line of float32
_SAMPLES = 600  # sampled entries expected above the threshold: a relative error of about 4 %
ROW, ROW_STRIDE = 1024, 16  # of a vector of at least this many rows, one of so many is sampled


def sampled_rows(vector: torch.Tensor) -> torch.Tensor:
    """Return a sample to estimate a mean square from: every 16th row of 1024 entries; all of a vector that is short."""
    if vector.numel() < ROW * ROW_STRIDE:
        return vector
    return vector[: vector.numel() // ROW * ROW].view(-1, ROW)[::ROW_STRIDE]


def sampled_runs(numel: int, share: float) -> tuple[int, int]:
    """Return how many runs of neighbors to sample to estimate the largest ``share``, and the stride between them."""
    runs = max(1, min(numel, int(_SAMPLES / share)) // RUN)
    return runs, numel // runs


def sampled_rank(size: int, share: float) -> int:
    """Return the index of the threshold in a sorted sample: the largest ``share`` of it starts there."""
    return size - max(1, round(size * share))


def search_for_largest(numel: int, k: int) -> tuple[float, int] | None:
    """Return how to find the k largest entries without sorting all: (share, capacity). None if that does not pay.

    The k largest are among the entries that reach the threshold estimated for ``share``, provided that there are at
    least k and at most ``capacity`` of these.
    """
    return None if numel < 4096 or 4 * k > numel else (1.25 * k / numel, 2 * k + 1024)
