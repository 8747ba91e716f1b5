"""Schedules one after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field, SerializeAsAny, field_serializer, field_validator, model_validator

from disttrain.errors import UserError
from disttrain.optim.schedules.learning_rate import Schedule, schedules
from disttrain.validation import Section, validate

_PART_FIELDS = ("steps", "epochs", "lr_factor")


class SequencePart(Section):
    """A schedule and how long it lasts."""

    schedule: SerializeAsAny[Schedule]
    steps: int | None = Field(default=None, ge=1, description="length of the part; the last one may omit it")
    epochs: float | None = Field(default=None, gt=0, description="the same in epochs")
    lr_factor: float = Field(default=1.0, gt=0, description="multiplies the rate throughout the part")

    def length(self, steps_per_epoch: float | None) -> int | None:
        """Return the length in steps; None: up to the end of the run."""
        if self.epochs is None:
            return self.steps
        assert steps_per_epoch is not None
        return max(1, round(self.epochs * steps_per_epoch))


class Sequential(Schedule):
    """Runs schedules one after another. Each treats its part as a run of its own, with its own warmup.

    ``parts: [{name: constant, warmup_steps: 100, epochs: 5}, {name: cosine, lr_factor: 0.5}]``. All parts but the last
    need a length, ``steps`` or ``epochs``.
    """

    parts: tuple[SequencePart, ...] = Field(
        min_length=1, description="sections with the name and fields of a schedule, and steps or epochs"
    )

    @field_validator("parts", mode="before")
    @classmethod
    def _build_parts(cls, parts: Any) -> tuple[SequencePart, ...]:
        if not isinstance(parts, Sequence) or isinstance(parts, str):
            raise UserError("should be a list of schedules, such as [{name: linear, steps: 100}, {name: constant}]")
        return tuple(_build_part(part, f"schedule.parts.{index}") for index, part in enumerate(parts))

    @field_serializer("parts")
    def _dump_parts(self, parts: tuple[SequencePart, ...]) -> list[dict[str, Any]]:
        return [
            {**schedules.dump(part.schedule), **part.model_dump(mode="json", include=set(_PART_FIELDS))}
            for part in parts
        ]

    @model_validator(mode="after")
    def _check(self) -> Sequential:
        if self.warmup_steps or self.warmup_epochs or self.by != "step":
            odd = "warmup_steps" if self.warmup_steps else "warmup_epochs" if self.warmup_epochs else "by"
            raise UserError(f"schedule.{odd} belongs to the parts of a sequence: set schedule.parts.0.{odd}")
        for index, part in enumerate(self.parts):
            key = f"schedule.parts.{index}"
            if part.steps is not None and part.epochs is not None:
                raise UserError(f"{key}.steps={part.steps} and {key}.epochs={part.epochs:g} clash: set one of them")
            if part.steps is None and part.epochs is None and index < len(self.parts) - 1:
                raise UserError(f"missing key '{key}.steps': all parts but the last need steps or epochs")
            if part.schedule.tracker() is not None:
                raise UserError(f"{key}.name='reduce_on_plateau' cannot be part of a sequence: use it alone")
        return self

    @property
    def needs_epochs(self) -> bool:
        return any(part.epochs is not None or part.schedule.needs_epochs for part in self.parts)

    def shape(self, time: float, length: float) -> float:
        raise AssertionError("the parts have the shapes")

    def factor(self, step: float, num_steps: int, steps_per_epoch: float | None = None) -> float:
        for part, start, length in self._intervals(num_steps, steps_per_epoch):
            if step < start + length or part is self.parts[-1]:
                return part.lr_factor * part.schedule.factor(step - start, length, steps_per_epoch)
        raise AssertionError

    def notable_steps(self, num_steps: int, steps_per_epoch: float | None = None) -> set[int]:
        return {
            start + step
            for part, start, length in self._intervals(num_steps, steps_per_epoch)
            for step in part.schedule.notable_steps(length, steps_per_epoch)
        }

    def check(
        self, num_steps: int, steps_per_epoch: float | None = None, key: str = "schedule", span: str = "run"
    ) -> None:
        if self.needs_epochs and steps_per_epoch is None:
            return
        intervals = list(self._intervals(num_steps, steps_per_epoch))
        _, start, length = intervals[-1]
        if length < 1 or start + length != num_steps:
            end = start + length if length >= 1 else start
            raise UserError(
                f"{key}.parts last {end} steps{' without the last one' if length < 1 else ''}, but the {span} has "
                f"{num_steps}: change their lengths, or remove that of the last part, which then takes the remaining "
                "steps"
            )
        for index, (part, _, length) in enumerate(intervals):
            part.schedule.check(length, steps_per_epoch, f"{key}.parts.{index}", "part")

    def _intervals(self, num_steps: int, steps_per_epoch: float | None) -> Iterator[tuple[SequencePart, int, int]]:
        """Yield each part, its first step and its number of steps."""
        start = 0
        for part in self.parts:
            given = part.length(steps_per_epoch)
            length = num_steps - start if given is None else given
            yield part, start, length
            start += length


def _build_part(spec: Any, key: str) -> SequencePart:
    if isinstance(spec, SequencePart):
        return spec
    if not isinstance(spec, Mapping):
        return SequencePart(schedule=schedules.build(spec, key))
    fields = {name: value for name, value in spec.items() if name in _PART_FIELDS}
    schedule = {name: value for name, value in spec.items() if name not in _PART_FIELDS}
    return validate(SequencePart, {"schedule": schedules.build(schedule, key), **fields}, key)
