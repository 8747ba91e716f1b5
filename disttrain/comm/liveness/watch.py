"""How the ranks watch each other: a config section, ``watch``."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from disttrain.validation import Section


class Watch(Section):
    """After how long a rank that is silent, late or slow is named, and what is done."""

    silence_seconds: float = Field(
        default=30.0, ge=1, description="a rank is lost that has shown no sign of life for so long"
    )
    grace_seconds: float = Field(
        default=10.0, ge=0, description="a survivor ends by itself so long after the news, whatever it is stuck in"
    )
    stall_seconds: float | None = Field(
        default=1800.0, ge=1, description="how long ranks wait in a collective that another has not come to; null: ever"
    )
    late_seconds: float | None = Field(
        default=240.0, ge=1, description="how long ranks wait so until a warning names the other; null: it does not"
    )
    on_stall: Literal["end", "warn"] = Field(default="end", description="end all ranks, or go on with a warning")
    straggler_factor: float | None = Field(
        default=2.0, gt=1, description="warn of a rank whose steps take so many times the others'; null: do not"
    )

    @property
    def patience(self) -> float:
        """Seconds after which all this is certainly over; inf: never. An engine must not give up before."""
        if self.stall_seconds is None or self.on_stall == "warn":
            return math.inf
        return self.stall_seconds + self.silence_seconds + self.grace_seconds
