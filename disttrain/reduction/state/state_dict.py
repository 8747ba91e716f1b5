"""Compressor state as named tensors, to save and to load. Keyed by parameter, so bucket sizes may change in between."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from disttrain.comm.base import Communicator
from disttrain.errors import UserError
from disttrain.reduction.bucket import GradientBucket

logger = logging.getLogger(__name__)


def state_dict(buckets: Sequence[GradientBucket], comm: Communicator, *, copy: bool = True) -> dict[str, Any]:
    """``{"rank", "world_size", "step", "replicated", "per_rank"}``; the last two map ``parameter/tensor`` to tensors.

    What is replicated is equal on all ranks; ``per_rank`` is this rank's own, and its mean over ranks is what counts.
    Without ``copy`` the tensors are views of the live ones, good until the next step.

    Both this run and one that goes on from it begin without knowing which parameters rest, and so do alike.
    """
    for bucket in buckets:
        for slot in bucket.slots:
            slot.idle = 0
    saved: dict[str, Any] = {
        "rank": comm.rank,
        "world_size": comm.world_size,
        "step": max(bucket.state.step for bucket in buckets),
        "replicated": {},
        "per_rank": {},
    }
    for key, view, replicated in _tensors(buckets):
        saved["replicated" if replicated else "per_rank"][key] = view.clone() if copy else view
    return saved


def load_state(buckets: Sequence[GradientBucket], saved: Mapping[str, Any], comm: Communicator) -> None:
    """Take over what ``state_dict`` gave.

    Residuals of another rank or world size are left at zero with a warning: taking them as one's own would send what
    another rank owes. (Give them their new owner with the right mean, and this rank's number, to keep them.)

    Raises:
        UserError: the names or sizes are those of another compressor or model.
    """
    is_own = (saved["rank"], saved["world_size"]) == (comm.rank, comm.world_size)
    found = {**saved["replicated"], **(saved["per_rank"] if is_own else {})}
    wanted = {key: view for key, view, replicated in _tensors(buckets) if replicated or is_own}
    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())[0]
        owner = "saved state" if odd in found else "present run"
        raise UserError(
            f"the saved compressor state does not fit, {odd!r} is only in the {owner}: "
            "resume with the compressor and model it was saved with"
        )
    if saved["per_rank"] and not is_own:
        logger.warning(
            "rank %d of %d: residuals saved by rank %d of %d are not mine and start at zero",
            comm.rank, comm.world_size, saved["rank"], saved["world_size"],
        )  # fmt: skip
    for key, view in wanted.items():
        if found[key].numel() != view.numel():
            raise UserError(f"the saved compressor state of {key!r} has another size: the model has changed")
        view.copy_(found[key])
    for bucket in buckets:
        bucket.state.step = saved["step"]


def _tensors(buckets: Sequence[GradientBucket]) -> Iterator[tuple[str, torch.Tensor, bool]]:
    for bucket in buckets:
        for parameter, name, view, replicated in bucket.state.slices(bucket.description.names):
            yield f"{parameter}/{name}", view, replicated
