"""What compressors have still to send, on its way to other ranks: its mean over ranks is what the model will receive.

Two kinds of tensors are a rank's own. Most (residuals, momenta) are as long as the parameter on every rank that holds
them - in a hierarchical exchange one rank of each node - and it is their mean that counts. Where codecs exchange in two
stages, each rank also owes a stretch of the mean itself, its ``server_residual``: put one after another in the order of
ranks these make up the whole parameter, and it is added to the mean of the residuals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from disttrain.collectives import AllReduce
from disttrain.comm.base import Communicator
from disttrain.comm.coalescing import run_coalesced
from disttrain.errors import UserError
from disttrain.reduction.bucket import GradientBucket
from disttrain.reduction.state.state_dict import state_dict

_OF_SERVER, _OF_RANK = "/server_residual", "/residual"

Tensors = Mapping[str, torch.Tensor]


def merge(shards: Mapping[int, Tensors], comm: Communicator) -> dict[str, torch.Tensor]:
    """By "parameter/tensor" what is pending as one 1-d tensor each, in float64; equal on all ranks. A collective.

    ``shards`` are some ranks' own tensors by rank: each rank's must be among those of one caller. What is owed by
    servers is added to the parameter's residual.

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
    """This rank's own tensors out of ``merge``'s: whole, or empty where in ``like``, its present state, they are.

    Its ``server_residual`` is zero, as what servers owed is in the residuals now.
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
    """Give every rank the mean of what all ranks have pending, and return it, whole. A collective.

    What the model will receive is as before; but it is now the same on all ranks, so one of them can save it.
    """
    own = state_dict(buckets, comm, copy=False)["per_rank"]
    merged = merge({comm.rank: own}, comm)
    for name, tensor in distribute(merged, own).items():
        own[name].copy_(tensor)
    return {name: tensor.to(own[name].dtype) for name, tensor in merged.items()}


def _plan(name: str, sizes: Mapping[int, Mapping[str, int]]) -> tuple[int, dict[int, tuple[int, int]]]:
    """How long the whole is, and by rank where its part begins and what it is divided by."""
    held = {rank: numel for rank, of_rank in sorted(sizes.items()) if (numel := of_rank.get(name, 0))}
    if not name.endswith(_OF_SERVER):
        if len(set(held.values())) > 1:
            raise UserError(f"the saved ranks have {name!r} in different sizes: their files do not belong together")
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
