"""The message of a meeting: a row of integers per reducer, combined over ranks by an all-reduce with "max".

A number whose minimum over ranks is needed too is sent twice, as it is and as its bitwise complement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum

import torch


class MeetingPoint(Enum):
    """Where a rank is when it meets the others."""

    BACKWARD_END = "the end of a backward pass"
    SYNCHRONIZE = "synchronize()"
    STEP = "step()"
    DROP = "zero_grad()"
    WEIGHT = "scale(loss, weight=...)"
    JOIN = "join()"


class Use(IntEnum):
    """Whether a rank has a gradient of a parameter in one exchange."""

    UNUSED = 0
    USED = 1
    LATE = 2
    """It came after its bucket had been closed, so a second exchange follows."""


class WeightRequest(IntEnum):
    """Whether a rank needs the mean of the losses' weights over ranks."""

    NONE = 0
    NOW = 1
    """For the gradients that it sends."""
    AHEAD = 2
    """For gradients of a backward pass that has not started yet."""


_SHIFT = 24


def encode_use(use: Use, position: int) -> int:
    """Return one integer for a use and the gradient's position in the exchange; the maximum over ranks is of both."""
    return (use << _SHIFT) + min(position, 2**_SHIFT - 1) if use else 0


def decode_use(number: int) -> tuple[Use, int]:
    """Return the use and the position."""
    return Use(number >> _SHIFT), number % 2**_SHIFT


NOTHING = -(2**31)
"""Sent where a rank has nothing to say: it is less than everything else."""


@dataclass
class Status:
    """What a rank says about one reducer, or after the all-reduce what all ranks have said.

    Attributes:
        step_number: number of steps that have ended, taken or dropped.
        is_gone: whether the reducer no longer exists there; such a rank says nothing else.
        sends: whether the rank has gradients to exchange.
        is_at_step: whether the rank is at the reducer's step.
        is_elsewhere: whether the rank has not joined and is not at the reducer's step.
        drops: whether the rank drops gradients of an open exchange.
        weight_request: see ``WeightRequest``.
        has_unweighted: whether the rank sends gradients of losses without weights.
        is_nonfinite: whether one of its gradients is inf or NaN.
        vote: see ``Reducer``.
        band: see ``compression.whitening``.
        size: number of parameters that it exchanges.
        settings: checksum of the optimizer's settings, at a step.
        gradients: checksum of gradients that the user has changed, at a step.
        min_step_number, min_size, min_settings, min_gradients: the minimum over ranks; of the last two, over those at
            the step.
        min_sending_step: the minimum of ``step_number`` over the ranks that send.
        uses: of each parameter, as written by ``encode_use``.
    """

    step_number: int = NOTHING
    min_step_number: int = 0
    is_gone: int = 0
    sends: int = 0
    min_sending_step: int = 0
    is_at_step: int = 0
    is_elsewhere: int = 0
    drops: int = 0
    weight_request: int = 0
    has_unweighted: int = 0
    is_nonfinite: int = 0
    vote: int = 0
    band: int = 0
    size: int = NOTHING
    min_size: int = 0
    settings: int = NOTHING
    min_settings: int = 0
    gradients: int = NOTHING
    min_gradients: int = 0
    uses: Sequence[int] = field(default_factory=list)

    def encode(self) -> list[int]:
        """Return the numbers that are sent."""
        complements = {
            "min_step_number": _complement(self.step_number),
            "min_size": _complement(self.size),
            "min_sending_step": _complement(self.step_number) if self.sends else NOTHING,
            "min_settings": _complement(self.settings),
            "min_gradients": _complement(self.gradients),
        }
        return [*(complements.get(name, getattr(self, name)) for name in _NUMBERS), *self.uses]

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Status:
        """Return the status of all ranks from the maximum of their numbers."""
        values = dict(zip(_NUMBERS, numbers, strict=False))
        for name in _COMPLEMENTS:
            values[name] = ~values[name]
        return cls(**values, uses=numbers[len(_NUMBERS) :])

    @property
    def has_dropped(self) -> bool:
        """Whether some ranks have dropped a step that others have not ended."""
        return self.min_step_number < self.step_number

    @property
    def is_step(self) -> bool:
        """Whether all ranks that have not joined are at the reducer's step."""
        return bool(self.is_at_step) and not self.is_elsewhere


_NUMBERS = [entry.name for entry in fields(Status) if entry.name != "uses"]
_COMPLEMENTS = ("min_step_number", "min_size", "min_sending_step", "min_settings", "min_gradients")
NUM_NUMBERS = len(_NUMBERS)


def _complement(number: int) -> int:
    return NOTHING if number == NOTHING else ~number


def to_tensor(moves: int, last_active: int, statuses: Sequence[Status]) -> torch.Tensor:
    """Return the message of a rank, int32, of 2 elements and those of all statuses."""
    return torch.tensor(
        [moves, last_active, *(number for status in statuses for number in status.encode())], dtype=torch.int32
    )


def from_tensor(tensor: torch.Tensor, num_parameters: Sequence[int]) -> tuple[int, int, list[Status]]:
    """Return the arguments of ``to_tensor``, for reducers with these numbers of parameters."""
    numbers, statuses, start = tensor.tolist(), [], 2
    for count in num_parameters:
        end = start + NUM_NUMBERS + count
        statuses.append(Status.decode(numbers[start:end]))
        start = end
    return numbers[0], numbers[1], statuses


def to_signed(checksum: int) -> int:
    """Return a 32-bit checksum as a signed integer above ``NOTHING``."""
    return checksum % (2**32 - 1) - 2**31 + 1
