"""Detection of changes by the user since the mean arrived: gradients that were dropped, stepped on or changed."""

from __future__ import annotations

from collections.abc import Sequence

from disttrain.reduction.buckets.bucket import GradientBucket, Slot

_NUM_FIRST = 64


def are_dropped(buckets: Sequence[GradientBucket]) -> bool:
    """Whether all gradients with a mean are None, or all are zero."""
    means = [slot.parameter.grad for bucket in buckets for slot in bucket.slots if slot.has_mean]
    if all(mean is None for mean in means):
        return True
    written = [bucket for bucket in buckets if bucket.flat._version != bucket.version]
    if not written or any(bucket.flat[:_NUM_FIRST].any() for bucket in written):  # the quick answer in most cases
        return False
    return not any(mean is not None and mean.any() for mean in means)


def version(slots: Sequence[Slot]) -> int:
    """Return a number that changes whenever parameters are modified in place, by any optimizer."""
    return sum(slot.parameter._version for slot in slots)


def sums(buckets: Sequence[GradientBucket]) -> list[float | None]:
    """Return the sum of each bucket's gradients and of each gradient outside its bucket, which ranks compare."""
    found: list[float | None] = [bucket.flat.sum().item() for bucket in buckets]
    for bucket in buckets:
        for slot in bucket.slots:
            grad = slot.parameter.grad
            if slot.has_mean and grad is not slot.view:
                found += [slot.index, None if grad is None else grad.sum().item()]
    return found
