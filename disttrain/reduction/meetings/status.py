"""What ranks tell each other when they meet: a row of small integers, of which the largest of all ranks count.

Every rank writes one ``Status`` for each reducer of the communicator. A number whose smallest value matters too is
written twice, as it is and as its complement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum

import torch


class Use(IntEnum):
    """Of a parameter, by a rank, in one exchange."""

    UNUSED = 0
    USED = 1
    LATE = 2
    """A gradient came after its bucket had left, so a second exchange has to follow."""


class Weighing(IntEnum):
    """Whether the sum of the losses' weights is wanted."""

    NOT = 0
    NOW = 1
    """For the exchange of what the rank has."""
    AHEAD = 2
    """For gradients that a backward pass is yet to give."""


_SHIFT = 24


def encode_use(use: Use, position: int) -> int:
    """With it, when the gradient came in this exchange, from 0: of all ranks' positions the last one counts."""
    return (use << _SHIFT) + min(position, 2**_SHIFT - 1) if use else 0


def decode_use(number: int) -> tuple[Use, int]:
    return Use(number >> _SHIFT), number % 2**_SHIFT


NOTHING = -(2**31)
"""Written where a rank has nothing to say: it is below all that others say."""


@dataclass
class Status:
    """What a rank says of one reducer, and what all ranks have said.

    Attributes:
        epoch: how many steps it has ended so far, by taking or by dropping them; and the smallest of all ranks'.
        sends: the rank has gradients to exchange; ``sends_in`` is the smallest epoch of the ranks that have.
        steps, is_elsewhere: the rank is at the reducer's step; or it is active, but not there.
        drops: the rank drops gradients that are on the wire.
        weighs, is_unweighed: see ``Weighing``; or the rank sends gradients of losses that have no weights.
        is_unsound: one of its gradients is inf or NaN.
        vote: see ``Reducer``.
        size: how many parameters it exchanges; and the smallest number of all ranks.
        settings, gradients: checksums of those with which the rank steps; and the smallest of the ranks that do.
        uses: of each parameter, as ``encode_use`` writes it.
    """

    epoch: int = 0
    min_epoch: int = 0
    sends: int = 0
    sends_in: int = 0
    steps: int = 0
    is_elsewhere: int = 0
    drops: int = 0
    weighs: int = 0
    is_unweighed: int = 0
    is_unsound: int = 0
    vote: int = 0
    size: int = 0
    min_size: int = 0
    settings: int = NOTHING
    min_settings: int = 0
    gradients: int = NOTHING
    min_gradients: int = 0
    uses: Sequence[int] = field(default_factory=list)

    def encode(self) -> list[int]:
        complements = {
            "min_epoch": ~self.epoch,
            "min_size": ~self.size,
            "sends_in": ~self.epoch if self.sends else NOTHING,
            "min_settings": ~self.settings if self.steps else NOTHING,
            "min_gradients": ~self.gradients if self.steps else NOTHING,
        }
        return [*(complements.get(name, getattr(self, name)) for name in _NUMBERS), *self.uses]

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Status:
        values = dict(zip(_NUMBERS, numbers, strict=False))
        for name in _COMPLEMENTS:
            values[name] = ~values[name]
        return cls(**values, uses=numbers[len(_NUMBERS) :])

    @property
    def has_dropped(self) -> bool:
        """Whether some ranks have dropped gradients that others still hold."""
        return self.min_epoch < self.epoch

    @property
    def is_step(self) -> bool:
        """Whether all active ranks are at the reducer's step."""
        return bool(self.steps) and not self.is_elsewhere


_NUMBERS = [entry.name for entry in fields(Status) if entry.name != "uses"]
_COMPLEMENTS = ("min_epoch", "min_size", "sends_in", "min_settings", "min_gradients")
NUM_NUMBERS = len(_NUMBERS)


def to_tensor(moves: int, last_active: int, words: Sequence[Status]) -> torch.Tensor:
    """(2 + all words' lengths,), int32."""
    return torch.tensor(
        [moves, last_active, *(number for word in words for number in word.encode())], dtype=torch.int32
    )


def from_tensor(tensor: torch.Tensor, num_parameters: Sequence[int]) -> tuple[int, int, list[Status]]:
    """``to_tensor``'s arguments, for reducers of so many parameters each."""
    numbers, words, start = tensor.tolist(), [], 2
    for count in num_parameters:
        end = start + NUM_NUMBERS + count
        words.append(Status.decode(numbers[start:end]))
        start = end
    return numbers[0], numbers[1], words


def signed(checksum: int) -> int:
    """A 32-bit checksum as a signed integer above ``NOTHING``."""
    return checksum % (2**32 - 1) - 2**31 + 1
