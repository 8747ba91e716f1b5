"""Base classes of batch policies. Between two steps, a policy decides how large the next batch is."""

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
    """The inputs of a policy's decision, the same on all ranks. Sizes are in samples over all workers.

    Attributes:
        batch_size: Current batch size.
        initial_size: Batch size at the start of the run.
        step: Optimizer steps so far, including skipped ones.
        epochs: Epochs so far, including the fraction of the current one.
        epoch_losses: Mean training losses of the epoch that has just ended and of the one before it; None except at
            the end of an epoch, from the second one on.
        noise: Gradient noise, up to the last step.
        is_measured: Whether the noise was measured in the last step.
    """

    batch_size: int
    initial_size: int
    step: int
    epochs: float
    epoch_losses: tuple[float, float] | None
    noise: GradientNoise
    is_measured: bool


class BatchPolicy(Section, ABC):
    """Fields are the config's ``batch:`` section. ``batch_size`` and ``accumulation`` are the initial values."""

    progress_unit: ClassVar[Literal["steps", "samples", "gains"]] = "steps"
    """What the run's length and schedules count: optimizer steps, samples in units of the initial batch, or gains."""
    needs_losses: ClassVar[bool] = False
    """Whether ``target_size`` uses ``epoch_losses``."""

    max_micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        default=None,
        description="most samples per backward pass of a worker; a larger batch takes more passes per step; null: no "
        "limit; auto: as many as fit in memory, estimated from measured passes",
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        description="with max_micro_batch=auto: GiB that a pass may use; null: most of what is free",
    )
    lr_scaling: Literal["none", "linear", "sqrt", "adascale"] = Field(
        default="none",
        description="factor on the learning rate when the batch is k times the initial one: 1, k, the square root of "
        "k, or AdaScale's gain, which is between 1 and k",
    )
    smoothing: float = Field(
        default=0.95, ge=0, lt=1, description="decay of the moving averages of the gradient noise per measurement"
    )
    measure_every: int | None = Field(
        default=None,
        ge=1,
        description="steps between two measurements of gradient noise, each of which costs a dense exchange under "
        "compression; null: 10 where some gradients are compressed, else 1",
    )

    @property
    def limit(self) -> int | None:
        """The largest batch size; None if it is constant."""
        return None

    @property
    def measures_noise(self) -> bool:
        return self.lr_scaling == "adascale"

    @abstractmethod
    def target_size(self, inputs: PolicyInputs) -> float:
        """Return the batch size for the next step. ``GrowingBatch`` applies the limit to it."""

    def lr_factor(self, target_size: float, batch_size: int) -> float:
        """Return the factor on the learning rate, for a batch that could not grow to ``target_size``."""
        return 1.0

    def reference_size(self, batch_size: int) -> int:
        """Return the batch size that the unscaled learning rate is meant for."""
        return batch_size

    def check(self, batch_size: int, epochs: int | None, max_steps: int | None) -> None:
        """Raise UserError if the policy does not fit a run."""
        if self.memory_gib is not None and self.max_micro_batch != "auto":
            raise UserError("batch.memory_gib needs batch.max_micro_batch=auto: set that too, or remove it")
        if self.limit is not None and self.limit < batch_size:
            raise UserError(
                f"batch.max_batch_size={self.limit} is below batch_size={batch_size}, which the run starts with: "
                "raise the former or lower the latter"
            )


class GrowingPolicy(BatchPolicy, ABC):
    """A policy under which the batch grows, up to ``max_batch_size``."""

    progress_unit = "samples"

    max_batch_size: int = Field(ge=1, description="largest batch, in samples over all workers")

    @property
    def limit(self) -> int:
        return self.max_batch_size


class NoisePolicy(GrowingPolicy, ABC):
    """A policy that grows the batch by the gradient noise."""

    min_measurements: int = Field(
        default=20, ge=1, description="measurements of gradient noise before the batch grows for the first time"
    )

    @property
    def measures_noise(self) -> bool:
        return True

    def target_size(self, inputs: PolicyInputs) -> float:
        if not inputs.is_measured or inputs.noise.num_measured < self.min_measurements:
            return inputs.batch_size
        return max(inputs.batch_size, self.size_for_noise(inputs))

    @abstractmethod
    def size_for_noise(self, inputs: PolicyInputs) -> float:
        """Return the batch size for the measured noise. The batch never shrinks to it."""
