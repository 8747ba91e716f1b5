"""One schedule after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field, SerializeAsAny, field_serializer, field_validator, model_validator

from disttrain.errors import UserError
from disttrain.optim.schedules.base import Schedule
from disttrain.validation import Section, validate

_OWN = ("steps", "epochs", "lr_factor")


class Part(Section):
    """A schedule with the length of the stretch that it has."""

    schedule: SerializeAsAny[Schedule]
    steps: int | None = Field(default=None, ge=1, description="how long it lasts; the last part may take the rest")
    epochs: float | None = Field(default=None, gt=0, description="the same in epochs")
    lr_factor: float = Field(default=1.0, gt=0, description="multiplies the rate throughout the part")

    def length(self, steps_per_epoch: float | None) -> int | None:
        """In steps; None: the rest."""
        if self.epochs is None:
            return self.steps
        assert steps_per_epoch is not None
        return max(1, round(self.epochs * steps_per_epoch))


class InSequence(Schedule):
    """Schedules one after another, each as if its stretch were the run, its own warm-up included.

    ``parts: [{name: constant, warmup_steps: 100, epochs: 5}, {name: cosine, lr_factor: 0.5}]``. All parts but the last
    say how long they are, by ``steps`` or ``epochs``.
    """

    parts: tuple[Part, ...] = Field(min_length=1, description="sections with a name, its fields, and steps or epochs")

    @field_validator("parts", mode="before")
    @classmethod
    def _build_parts(cls, parts: Any) -> tuple[Part, ...]:
        if not isinstance(parts, Sequence) or isinstance(parts, str):
            raise UserError("should be a list of schedules, such as [{name: linear, steps: 100}, {name: constant}]")
        return tuple(_build_part(part, f"schedule.parts.{index}") for index, part in enumerate(parts))

    @field_serializer("parts")
    def _dump_parts(self, parts: tuple[Part, ...]) -> list[dict[str, Any]]:
        from disttrain.optim.schedules import schedules

        own = [part.model_dump(mode="json", include=set(_OWN)) for part in parts]
        return [{**schedules.dump(part.schedule), **rest} for part, rest in zip(parts, own, strict=True)]

    @model_validator(mode="after")
    def _check(self) -> InSequence:
        if self.warmup_steps or self.warmup_epochs or self.by != "step":
            odd = "warmup_steps" if self.warmup_steps else "warmup_epochs" if self.warmup_epochs else "by"
            raise UserError(f"schedule.{odd} is for the parts of a sequence: set schedule.parts.0.{odd}")
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
        for part, start, length in self._stretches(num_steps, steps_per_epoch):
            if step < start + length or part is self.parts[-1]:
                return part.lr_factor * part.schedule.factor(step - start, length, steps_per_epoch)
        raise AssertionError

    def notable(self, num_steps: int, steps_per_epoch: float | None = None) -> set[int]:
        return {
            start + step
            for part, start, length in self._stretches(num_steps, steps_per_epoch)
            for step in part.schedule.notable(length, steps_per_epoch)
        }

    def check(
        self, num_steps: int, steps_per_epoch: float | None = None, key: str = "schedule", span: str = "run"
    ) -> None:
        if self.needs_epochs and steps_per_epoch is None:
            return
        stretches = list(self._stretches(num_steps, steps_per_epoch))
        _, start, length = stretches[-1]
        if length < 1 or start + length != num_steps:
            end = start + length if length >= 1 else start
            raise UserError(
                f"{key}.parts last {end} steps{' without the last one' if length < 1 else ''}, but the {span} has "
                f"{num_steps}: change their lengths, or leave out that of the last, which then takes the rest"
            )
        for index, (part, _, length) in enumerate(stretches):
            part.schedule.check(length, steps_per_epoch, f"{key}.parts.{index}", "part")

    def _stretches(self, num_steps: int, steps_per_epoch: float | None) -> Iterator[tuple[Part, int, int]]:
        """Each part with its first step and its number of steps."""
        start = 0
        for part in self.parts:
            given = part.length(steps_per_epoch)
            length = num_steps - start if given is None else given
            yield part, start, length
            start += length


def _build_part(spec: Any, key: str) -> Part:
    from disttrain.optim.schedules import schedules

    if isinstance(spec, Part):
        return spec
    if not isinstance(spec, Mapping):
        return Part(schedule=schedules.build(spec, key))
    own = {name: value for name, value in spec.items() if name in _OWN}
    return validate(
        Part, {"schedule": schedules.build({k: v for k, v in spec.items() if k not in _OWN}, key), **own}, key
    )
