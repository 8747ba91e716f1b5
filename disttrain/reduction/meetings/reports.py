"""What a rank reports about a reducer when the ranks meet."""

from __future__ import annotations

import zlib

from disttrain.reduction.meetings import user_changes
from disttrain.reduction.meetings.participant import Participant
from disttrain.reduction.meetings.status import MeetingPoint, Status, WeightRequest, encode_use, to_signed


def report(participant: Participant, point: MeetingPoint, *, is_here: bool, sends: bool) -> Status:
    """Return this rank's status.

    Args:
        participant: the reducer.
        point: where this rank is.
        is_here: whether ``point`` is one of this reducer, and not of another one or of none.
        sends: whether this rank has gradients to exchange; if so, all buckets are closed.
    """
    step = participant.step
    uses = [0] * participant.num_parameters
    status = Status(step_number=step.number, sends=sends, vote=participant.vote, size=len(participant.slots), uses=uses)
    is_at_step = point is MeetingPoint.STEP and is_here
    status.is_elsewhere = point is not MeetingPoint.JOIN and not is_at_step
    status.drops = point is MeetingPoint.DROP and is_here
    if is_at_step:
        status.is_at_step = 1
        status.settings = to_signed(zlib.crc32(participant.settings().encode()))
        status.gradients = _gradients_checksum(participant)
        status.band = participant.band
    if sends:
        status.is_nonfinite = not participant.check_finite()
        for slot in participant.slots:
            uses[slot.index] = encode_use(slot.use, slot.position or 0)
    if point is MeetingPoint.WEIGHT and is_here:
        status.weight_request = WeightRequest.AHEAD
    elif sends and step.weights.is_pending:
        status.weight_request = WeightRequest.NOW
    status.has_unweighted = sends and step.weights.local is None and any(uses)
    return status


def _gradients_checksum(participant: Participant) -> int:
    """0 if the user has not changed the gradients."""
    if not participant.has_changed_means:
        return 0
    return to_signed(zlib.crc32(repr(user_changes.sums(participant.buckets)).encode()))
