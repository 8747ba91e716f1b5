"""Assigning residuals to other ranks. Their mean over ranks is preserved, since the model has yet to receive it.

There are two kinds of per-rank tensors. Most (residuals, momenta) are as long as the parameter on every rank that has
them, which in a hierarchical exchange is one rank of each node; their mean counts. With codecs that exchange in two
stages, each rank also has the residual of a part of the mean, its ``server_residual``. Concatenated in the order of
ranks these make up the whole parameter, which is added to the mean of the residuals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from disttrain.collectives import AllReduce
from disttrain.comm.base import Communicator
from disttrain.comm.coalescing import run_coalesced
from disttrain.errors import UserError
from disttrain.reduction.buckets.bucket import GradientBucket
from disttrain.reduction.state.state_dict import state_dict

_OF_SERVER, _OF_RANK = "/server_residual", "/residual"

Tensors = Mapping[str, torch.Tensor]


def merge(shards: Mapping[int, Tensors], comm: Communicator) -> dict[str, torch.Tensor]:
    """Return the mean over ranks by "parameter/tensor", 1-d, in float64; equal on all ranks. A collective.

    Server residuals are added to the parameter's residual.

    Args:
        shards: per-rank tensors of some ranks, by rank. Each rank's must be given by exactly one caller.
        comm: the callers.

    Raises:
        UserError: the shards do not fit each other; on all ranks.
    """
    sizes = _sizes_by_rank(shards, comm)
    plans = {name: _plan(name, sizes) for name in sorted({name for of_rank in sizes.values() for name in of_rank})}
    merged = {name: torch.zeros(total, dtype=torch.float64, device=comm.device) for name, (total, _) in plans.items()}
    for name, whole in merged.items():
        for rank, (start, weight) in plans[name][1].items():
            if rank in shards:
                own = shards[rank][name].reshape(-1).to(whole.device, torch.float64)
                whole[start : start + own.numel()] += own / weight
    run_coalesced(merged.values(), comm, lambda flat: AllReduce(flat, "sum"))
    for name in [name for name in merged if name.endswith(_OF_SERVER)]:
        merged[_residual_beside(name)] += merged.pop(name)
    return merged


def distribute(merged: Tensors, like: Tensors) -> dict[str, torch.Tensor]:
    """Return this rank's own tensors from what ``merge`` returned.

    They are whole, or empty where they are empty in ``like``, this rank's current state. Server residuals are zero, as
    they are part of the residuals now.

    Raises:
        UserError: sizes differ from those in ``like``.
    """
    found = {}
    for name, tensor in merged.items():
        mine = like.get(name)
        if mine is not None and mine.numel() not in (0, tensor.numel()):
            raise UserError(f"the saved compressor state of {name!r} has another size: the model has changed")
        kept = tensor if mine is None else tensor[: mine.numel()]
        found[name] = kept.to(torch.float32 if mine is None else mine.dtype)
    servers = {name: torch.zeros_like(mine) for name, mine in like.items() if name.endswith(_OF_SERVER)}
    return found | {name: zeros for name, zeros in servers.items() if _residual_beside(name) in found}


@torch.no_grad()
def average(buckets: Sequence[GradientBucket], comm: Communicator) -> dict[str, torch.Tensor]:
    """Replace every rank's residuals by their mean over ranks, and return that. A collective.

    The model will receive the same as before, and one rank can save the state of all.
    """
    own = state_dict(buckets, comm, copy=False)["per_rank"]
    merged = merge({comm.rank: own}, comm)
    for name, tensor in distribute(merged, own).items():
        own[name].copy_(tensor)
    return {name: tensor.to(own[name].dtype) for name, tensor in merged.items()}


def _plan(name: str, sizes: Mapping[int, Mapping[str, int]]) -> tuple[int, dict[int, tuple[int, int]]]:
    """Return the length of the merged tensor, and by rank the start and the divisor of its part."""
    held = {rank: numel for rank, of_rank in sorted(sizes.items()) if (numel := of_rank.get(name, 0))}
    if not name.endswith(_OF_SERVER):
        if len(set(held.values())) > 1:
            raise UserError(f"the saved ranks have {name!r} in different sizes: the files are of different checkpoints")
        return max(held.values(), default=0), {rank: (0, len(held)) for rank in held}
    starts, total = {}, 0
    for rank, numel in held.items():
        starts[rank] = (total, 1)
        total += numel
    whole = max((of_rank.get(_residual_beside(name), 0) for of_rank in sizes.values()), default=0)
    if total != whole:
        raise UserError(f"the saved pieces of {name!r} are {total} elements of {whole}: files of ranks are missing")
    return total, starts


def _sizes_by_rank(shards: Mapping[int, Tensors], comm: Communicator) -> dict[int, dict[str, int]]:
    own = [[rank, {name: tensor.numel() for name, tensor in shard.items()}] for rank, shard in shards.items()]
    return {rank: numels for some in comm.all_gather_object(own) for rank, numels in some}


def _residual_beside(name: str) -> str:
    return name.removesuffix(_OF_SERVER) + _OF_RANK
