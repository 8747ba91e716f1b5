"""Options that change over the first steps. They depend only on committed steps, so all ranks agree on them."""

from __future__ import annotations

from pydantic import Field

from disttrain.validation import Section


class Ramp(Section):
    """Changes an option from ``start`` to the option's own value."""

    steps: int = Field(ge=1, description="committed steps that it takes, from the first one, dense steps included")

    def progress(self, step: int) -> float:
        """Return the progress at a step: 0 at the first one, at most 1."""
        return min(1.0, step / self.steps)


class RatioRamp(Ramp):
    """Geometric: multiplies by the same factor each step."""

    start: float = Field(gt=0, le=1, description="ratio of the first step")

    def at(self, step: int, end: float) -> float:
        progress = self.progress(step)
        return end if progress == 1 else self.start * (end / self.start) ** progress


class RankRamp(Ramp):
    """Linear, rounded to integers."""

    start: int = Field(ge=1, description="rank of the first step")

    def at(self, step: int, end: int) -> int:
        return round(self.start + (end - self.start) * self.progress(step))
