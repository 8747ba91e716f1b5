"""How the ranks watch each other: a config section, ``watch``."""

from __future__ import annotations

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
        default=240.0, ge=1, description="how long ranks wait in a collective that another has not come to; null: ever"
    )
    on_stall: Literal["end", "warn"] = Field(default="end", description="end all ranks, or go on with a warning")
    straggler_factor: float | None = Field(
        default=2.0, gt=1, description="warn of a rank whose steps take so many times the others'; null: do not"
    )
