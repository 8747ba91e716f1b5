"""How the ranks watch each other: the config section ``watch``."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from disttrain.validation import Section


class Watch(Section):
    """When a silent, late or slow rank is reported, and what happens then."""

    silence_seconds: float = Field(
        default=30.0, ge=1, description="seconds without a heartbeat after which a rank counts as lost"
    )
    grace_seconds: float = Field(
        default=10.0, ge=0, description="seconds that surviving ranks have to exit by themselves after a loss"
    )
    stall_seconds: float | None = Field(
        default=1800.0, ge=1, description="seconds that ranks may wait in a collective for a late rank; null: no limit"
    )
    late_seconds: float | None = Field(
        default=240.0,
        ge=1,
        description="seconds of waiting after which a warning names the late rank; null: never",
    )
    on_stall: Literal["end", "warn"] = Field(default="end", description="end all ranks, or warn and continue")
    straggler_factor: float | None = Field(
        default=2.0, gt=1, description="warn if a rank's steps take this many times the others' median; null: never"
    )

    @property
    def patience(self) -> float:
        """Seconds by which the guard has ended any stalled run; inf if never. An engine must not time out earlier."""
        if self.stall_seconds is None or self.on_stall == "warn":
            return math.inf
        return self.stall_seconds + self.silence_seconds + self.grace_seconds
