"""Grouping parameters into buckets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from disttrain.compression import Bucket, Compressor, Policy, hierarchical
from disttrain.compression.base import Hierarchy
from disttrain.compression.whitening import BucketWhitening
from disttrain.reduction.buckets.bucket import GradientBucket, NamedParameter, Slot


def build_buckets(
    parameters: Sequence[NamedParameter],
    policy: Policy,
    *,
    rank: int,
    world_size: int,
    bucket_mb: float | None = None,
    hierarchy: Hierarchy | None = None,
    others: Sequence[NamedParameter] = (),
    indices: Mapping[str, int] | None = None,
) -> list[GradientBucket]:
    """Group parameters into buckets of one compressor, dtype and device, in the order in which backward reaches them.

    Buckets are ordered by when their last gradient is due. The grouping depends on the parameters and the policy only,
    so it is the same on all ranks.

    Args:
        parameters: names and parameters, in the order of the model's modules.
        policy: chooses the compressor of each parameter.
        rank: this rank.
        world_size: number of ranks.
        bucket_mb: MiB of gradient in a bucket; None leaves it to the compressor.
        hierarchy: this rank's place in the nodes, for hierarchical compressors.
        others: parameters that get no bucket here, but that rules of the policy may name.
        indices: the slots' indices, by name; by default the positions in ``parameters``.

    Raises:
        UserError: a rule or a compressor of the policy does not suit the parameters.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in (*parameters, *others)}
    compressors = policy.assign(shapes)[: len(parameters)]
    open_groups: dict[tuple[Compressor, torch.dtype, torch.device], list[tuple[int, NamedParameter]]] = {}
    groups: list[tuple[Compressor, list[tuple[int, NamedParameter]]]] = []
    pairs = list(zip(parameters, compressors, strict=True))
    for due, ((name, parameter), chosen) in enumerate(reversed(pairs)):  # backward starts at the model's end
        key = (chosen, parameter.dtype, parameter.device)
        group = open_groups.setdefault(key, [])
        if not group:
            groups.append((chosen, group))
        group.append((due, (name, parameter)))
        capacity = (bucket_mb if bucket_mb is not None else chosen.bucket_mb) * 2**20
        if sum(member.numel() * member.itemsize for _, (_, member) in group) >= capacity:
            del open_groups[key]
    groups.sort(key=lambda item: item[1][-1][0])  # by the member that is due last
    buckets = [_build(chosen, [member for _, member in group], rank, world_size, hierarchy) for chosen, group in groups]
    indices = indices or {name: index for index, (name, _) in enumerate(parameters)}
    for bucket in buckets:
        bucket.dense_steps, bucket.dense = policy.dense_steps, policy.dense_as
        # What is sent in half precision needs no whitening.
        if policy.whiten is not None and bucket.compressor.needs_float32 and not policy.is_dense(bucket.compressor):
            bucket.whitening = BucketWhitening(policy.whiten, bucket.description, bucket.state)
        for slot in bucket.slots:
            slot.index = indices[slot.name]
    return buckets


def _build(
    compressor: Compressor,
    parameters: Sequence[NamedParameter],
    rank: int,
    world_size: int,
    hierarchy: Hierarchy | None,
) -> GradientBucket:
    first = parameters[0][1]
    # Compressors keep residuals and factors in float32 at least.
    dtype = torch.promote_types(first.dtype, torch.float32) if compressor.needs_float32 else first.dtype
    description = Bucket(
        names=tuple(name for name, _ in parameters),
        shapes=tuple(tuple(parameter.shape) for _, parameter in parameters),
        dtype=dtype,
        device=first.device,
        rank=rank,
        world_size=world_size,
        hierarchy=hierarchy if compressor.hierarchical else None,
    )
    flat = torch.zeros(description.numel, dtype=first.dtype, device=first.device)
    bucket = GradientBucket(description, compressor, hierarchical.init_state(compressor, description), flat)
    for (name, parameter), part in zip(parameters, description.split(flat), strict=True):
        bucket.slots.append(Slot(name, parameter, _view_like(part, parameter), bucket, len(bucket.slots)))
    return bucket


def _view_like(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """View ``part`` in the parameter's shape, and in its strides if it is dense with dimension 0 outermost.

    So a channels_last weight gets a channels_last gradient, and rows of the buffer's matrix view are its dimension 0.
    """
    strides = parameter.stride()
    by_stride = sorted(range(parameter.dim()), key=lambda dim: strides[dim], reverse=True)
    expected = 1
    for dim in reversed(by_stride):
        if parameter.shape[dim] > 1 and strides[dim] != expected:
            return part.view(parameter.shape)
        expected *= parameter.shape[dim]
    rows = parameter.shape[0] if parameter.dim() else 1
    if rows > 1 and strides[0] != math.prod(parameter.shape[1:]):
        return part.view(parameter.shape)
    return part.as_strided(parameter.shape, strides)
