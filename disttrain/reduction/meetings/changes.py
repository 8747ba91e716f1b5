"""What users have done to gradients since their means arrived: dropped them, stepped on them, changed them."""

from __future__ import annotations

from collections.abc import Sequence

from disttrain.reduction.bucket import GradientBucket, Slot

_FEW = 64


def are_dropped(buckets: Sequence[GradientBucket]) -> bool:
    """Whether all means are gone, or have become zeros."""
    means = [slot.parameter.grad for bucket in buckets for slot in bucket.slots if slot.has_mean]
    if all(mean is None for mean in means):
        return True
    written = [bucket for bucket in buckets if bucket.flat._version != bucket.version]
    if not written or any(bucket.flat[:_FEW].any() for bucket in written):  # most are not zero, which is soon seen
        return False
    return not any(mean is not None and mean.any() for mean in means)


def version(slots: Sequence[Slot]) -> int:
    """Another number after a step on the parameters, whoever has taken it."""
    return sum(slot.parameter._version for slot in slots)


def sums(buckets: Sequence[GradientBucket]) -> list[float | None]:
    """The sum of each bucket's gradients, and of each gradient that is not in its bucket: what ranks compare."""
    found: list[float | None] = [bucket.flat.sum().item() for bucket in buckets]
    for bucket in buckets:
        for slot in bucket.slots:
            grad = slot.parameter.grad
            if slot.has_mean and grad is not slot.view:
                found += [slot.index, None if grad is None else grad.sum().item()]
    return found
