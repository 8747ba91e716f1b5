"""Contradictions between what ranks report. They raise the same error on all ranks."""

from __future__ import annotations

from disttrain.comm.base import Communicator
from disttrain.errors import UserError
from disttrain.reduction.meetings import user_changes
from disttrain.reduction.meetings.participant import Participant
from disttrain.reduction.meetings.status import MeetingPoint, Status

_TOLERANCE = 1e-5


def check(participant: Participant, agreed: Status, point: MeetingPoint, control: Communicator) -> None:
    """Raise UserError if the ranks' programs contradict each other. A collective if they step differently.

    Args:
        participant: the reducer.
        agreed: what all ranks have reported about it.
        point: where this rank is.
        control: the communicator of the meeting.
    """
    name = participant.description
    if agreed.min_size != agreed.size:
        raise UserError(
            f"ranks train different parameters of {name}: {agreed.min_size} on one, {agreed.size} on another; "
            "freeze, unfreeze and add the same parameters on all ranks"
        )
    if agreed.min_sending_step < agreed.step_number:
        raise UserError(
            f"a rank has dropped the gradients of {name} (zero_grad) to which another rank adds: "
            "drop them on all ranks, for instance where comm.all_reduce(flag, 'max') is set"
        )
    if agreed.weight_request and agreed.has_unweighted:
        raise UserError(
            f"some losses of {name} were given a weight and others were not: give every loss of a step a weight, on "
            "all ranks, by optimizer.scale(loss, weight=...)"
        )
    if not agreed.is_step or agreed.has_dropped:
        return
    if agreed.settings != agreed.min_settings:
        gathered = control.all_gather_object(None if point is MeetingPoint.JOIN else participant.settings())
        by_rank = {rank: settings for rank, settings in enumerate(gathered) if settings is not None}
        first = min(by_rank)
        odd = next(rank for rank in by_rank if by_rank[rank] != by_rank[first])
        raise UserError(
            f"ranks step {name} with different settings: rank {first} with {by_rank[first]}, "
            f"rank {odd} with {by_rank[odd]}; set them from numbers that are the same on all ranks"
        )
    if agreed.gradients != agreed.min_gradients and not agreed.sends:
        _compare_gradients(participant, point, control)


def _compare_gradients(participant: Participant, point: MeetingPoint, control: Communicator) -> None:
    """Raise UserError if gradients that users have changed differ between ranks by more than rounding."""
    own = None if point is MeetingPoint.JOIN else [repr(entry) for entry in user_changes.sums(participant.buckets)]
    by_rank = {rank: sums for rank, sums in enumerate(control.all_gather_object(own)) if sums is not None}
    first = min(by_rank)
    for rank, sums in by_rank.items():
        if len(sums) != len(by_rank[first]) or not all(map(_are_close, sums, by_rank[first])):
            raise UserError(
                f"rank {rank} has not changed the gradients of {participant.description} between backward and step "
                f"as rank {first} has, so the replicas would differ. Change them in the same way on all ranks, or "
                "before they are averaged (inside optimizer.no_sync(), or by a hook of the parameter)"
            )


def _are_close(one: str, other: str) -> bool:
    """Whether two numbers as text, or ``None``, are the same up to rounding."""
    if one == other:
        return True
    if "None" in (one, other):
        return False
    left, right = float(one), float(other)
    return abs(left - right) <= _TOLERANCE * max(abs(left), abs(right))


def check_existence(description: str, agreed: Status) -> None:
    """Raise UserError if some ranks use a reducer that no longer exists on others.

    Ranks may let go of it at different times, as Python's garbage collector does.
    """
    if agreed.is_gone and (agreed.sends or agreed.is_at_step):
        raise UserError(f"{description} is used on some ranks and was deleted on others: keep it on all ranks")


def raise_different_steps(participant: Participant | None, control: Communicator) -> None:
    """Raise UserError: all ranks wait at steps, but not at the same one. A collective.

    Args:
        participant: the reducer at whose step this rank is, if any.
        control: the communicator of the meeting.
    """
    gathered = control.all_gather_object(None if participant is None else participant.description)
    steps = [(rank, name) for rank, name in enumerate(gathered) if name is not None]
    (first, one), (second, other) = steps[0], next(entry for entry in steps if entry[1] != steps[0][1])
    raise UserError(
        f"rank {first} is at the step of {one}, rank {second} at that of {other}: step the same optimizers in the same "
        "order on all ranks"
    )
