"""What a batch policy is: it is asked between two steps how large the next batch should be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from disttrain.batching.gradient_noise import GradientNoise
from disttrain.errors import UserError
from disttrain.validation import Section


@dataclass(frozen=True)
class PolicyInputs:
    """Where a run stands, as a policy sees it; equal on all ranks. Sizes are samples over all workers.

    Attributes:
        batch_size: the present one.
        initial: the one at the run's beginning.
        step: optimizer steps done, skipped ones included.
        epochs: epochs done, with the part of the present one.
        epoch_losses: mean training losses of the epoch that has just ended and of the one before it; None except right
            at an epoch's end, and at the first.
        noise: of gradients, up to the last step.
        is_measured: whether the last step was measured.
    """

    batch_size: int
    initial: int
    step: int
    epochs: float
    epoch_losses: tuple[float, float] | None
    noise: GradientNoise
    is_measured: bool


class BatchPolicy(Section, ABC):
    """Fields are the config's ``batch:`` section. ``batch_size`` and ``accumulation`` are the initial ones."""

    clock: ClassVar[Literal["steps", "samples", "gains"]] = "steps"
    """What the run's length and schedules count: optimizer steps, initial batches of samples, or gains."""
    needs_losses: ClassVar[bool] = False
    """Whether ``target`` looks at ``epoch_losses``."""

    max_micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        default=None,
        description="samples that fit a backward pass of one worker: beyond, a step takes more passes; null: no limit; "
        "auto: as many as fit its memory, by what a pass took",
    )
    memory_gib: float | None = Field(
        default=None, gt=0, description="with max_micro_batch=auto: GiB a pass may take; null: most of what is free"
    )
    lr_scaling: Literal["none", "linear", "sqrt", "adascale"] = Field(
        default="none",
        description="what the learning rate is multiplied by where the batch is k times the initial one: "
        "1, k, the root of k, or AdaScale's gain, which lies between 1 and k",
    )
    smoothing: float = Field(
        default=0.95, ge=0, lt=1, description="of the noise's two estimators: what one measurement leaves of the others"
    )
    measure_every: int | None = Field(
        default=None,
        ge=1,
        description="steps between two measurements of noise, each of which costs a dense exchange under compression; "
        "null: 10 where some gradients travel compressed, else 1",
    )

    @property
    def limit(self) -> int | None:
        """The largest batch; None where it does not change."""
        return None

    @property
    def measures_noise(self) -> bool:
        return self.lr_scaling == "adascale"

    @abstractmethod
    def target(self, situation: PolicyInputs) -> float:
        """The batch size wanted for the next step; the limit is seen to by others."""

    def cut(self, target: float, batch_size: int) -> float:
        """What the learning rate is multiplied by where the batch could not grow to ``target``."""
        return 1.0

    def reference(self, batch_size: int) -> int:
        """The batch size for which the learning rate is meant, that scaling compares with."""
        return batch_size

    def check(self, batch_size: int, epochs: int | None, max_steps: int | None) -> None:
        """Raise UserError if the policy does not fit a run."""
        if self.memory_gib is not None and self.max_micro_batch != "auto":
            raise UserError("batch.memory_gib is for batch.max_micro_batch=auto: set that as well, or remove it")
        if self.limit is not None and self.limit < batch_size:
            raise UserError(
                f"batch.max_batch_size={self.limit} is below batch_size={batch_size}, with which the run begins: "
                "raise the one or lower the other"
            )


class GrowingPolicy(BatchPolicy, ABC):
    """A policy under which the batch grows, up to ``max_batch_size``."""

    clock = "samples"

    max_batch_size: int = Field(ge=1, description="the largest batch, in samples over all workers")

    @property
    def limit(self) -> int:
        return self.max_batch_size


class NoisePolicy(GrowingPolicy, ABC):
    """A policy that goes by the noise of gradients."""

    min_measurements: int = Field(default=20, ge=1, description="of noise, before the batch grows for the first time")

    @property
    def measures_noise(self) -> bool:
        return True

    def target(self, situation: PolicyInputs) -> float:
        if not situation.is_measured or situation.noise.num_measured < self.min_measurements:
            return situation.batch_size
        return max(situation.batch_size, self.wanted(situation))

    @abstractmethod
    def wanted(self, situation: PolicyInputs) -> float:
        """The batch size that the noise asks for; smaller than the present one counts as that."""
