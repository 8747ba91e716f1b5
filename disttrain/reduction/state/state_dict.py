"""Saving and loading the compressors' state as named tensors, keyed by parameter, so that buckets may change."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from disttrain.comm.base import Communicator
from disttrain.errors import UserError
from disttrain.reduction.buckets.bucket import GradientBucket

logger = logging.getLogger(__name__)


def state_dict(buckets: Sequence[GradientBucket], comm: Communicator, *, copy: bool = True) -> dict[str, Any]:
    """Return the state: ``{"rank", "world_size", "step", "replicated", "per_rank"}``.

    The last two map ``parameter/tensor`` to tensors: ``replicated`` ones are equal on all ranks, ``per_rank`` ones are
    this rank's own.

    Forgets which parameters are unused, so that this run and one that resumes from the state do the same.

    Args:
        buckets: whose state to save.
        comm: the ranks.
        copy: False returns views of the live tensors, which are valid until the next step.
    """
    for bucket in buckets:
        for slot in bucket.slots:
            slot.num_unused = 0
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
    """Load what ``state_dict`` returned.

    Residuals that another rank or a run of another world size saved are not loaded: they start at zero, with a warning.
    (``resharding`` assigns them to new ranks; write this rank's number into the result.)

    Raises:
        UserError: the state is that of another compressor or model.
    """
    is_own = (saved["rank"], saved["world_size"]) == (comm.rank, comm.world_size)
    found = {**saved["replicated"], **(saved["per_rank"] if is_own else {})}
    wanted = {key: view for key, view, replicated in _tensors(buckets) if replicated or is_own}
    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())[0]
        owner = "saved state" if odd in found else "current run"
        raise UserError(
            f"the saved compressor state does not fit, {odd!r} is only in the {owner}: "
            "resume with the compressor and model it was saved with"
        )
    if saved["per_rank"] and not is_own:
        logger.warning(
            "rank %d of %d: residuals saved by rank %d of %d are not loaded and start at zero",
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
