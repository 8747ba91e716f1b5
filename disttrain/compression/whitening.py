"""Whitening: gradients are compressed in units in which the optimizer's second moment is one.

Adam divides each entry by the root of its second moment v, so errors of compression in entries with a small v are
magnified. Whitened gradients g / D, with D = sqrt(v) + eps, have about the same size everywhere: one scale per block
fits, a low rank finds the directions that Adam will take, and what is sent late is not divided by a v that it spoiled.

All ranks have the same D. The compressor, its error feedback included, sees g / D, and the mean it returns is
multiplied by D, so ``parameter.grad`` is a mean gradient as ever. v is not updated from compressed means. The optimizer
updates it in *refreshes*, steps that send the gradients alone, without residuals and uncompressed; D is read from it.

Related: 1-bit Adam (Tang et al. 2021, arXiv:2102.02888) freezes v and compresses the momentum, 0/1 Adam (Lu et al.
2022, arXiv:2202.06009) updates v in some steps.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from pydantic import Field

from disttrain.compression import hierarchical
from disttrain.compression.base import Bucket, Compressor, Program, State
from disttrain.kernels import Units, for_device
from disttrain.validation import Section


class Band(IntEnum):
    """What a rank says of its whitened gradients. The maximum over ranks tells whether to refresh."""

    NOTHING = 0
    """There was none to compare."""
    BELOW = 1
    """The mean square of some parameter is below the band. That counts if it is so on all ranks."""
    WITHIN = 2
    ABOVE = 3
    """The mean square of some parameter is above the band."""

    @property
    def asks_for_refresh(self) -> bool:
        """Whether ranks with this maximum refresh in the next step."""
        return self in (Band.BELOW, Band.ABOVE)


_SCALE, _SCHEDULE = "whitening_scale", "whitening_schedule"
_START, _NEXT, _UPDATED = range(3)  # columns of the schedule, which has a row for each parameter


class Whitening(Section):
    """When gradients are refreshed, and how far whitened ones may deviate.

    A refresh follows after a share of the steps that the parameter has been trained for, so intervals grow with the age
    of the second moment, which a young one does not bear (it is a mean of few squares).
    """

    warmup_steps: int = Field(default=100, ge=1, description="first steps of each parameter, which are sent dense")
    refresh_growth: float = Field(
        default=0.2, gt=0, le=1, description="steps from one refresh to the next, as a share of the steps so far"
    )
    max_interval: int = Field(default=128, ge=1, description="largest number of steps from one refresh to the next")
    band: float = Field(
        default=16.0,
        gt=1,
        description="refresh in the next step if the mean square of a parameter's whitened gradient exceeds this times "
        "the number of workers on any worker, or falls below its inverse on all",
    )
    bound: float = Field(
        default=64.0, gt=1, description="whitened entries are clamped to this magnitude, far above what is usual"
    )


class BucketWhitening:
    """The whitening of one bucket. Its tensors are part of the compressor's state.

    Attributes:
        scale: (bucket.numel,), what gradients are divided by.
    """

    def __init__(self, options: Whitening, bucket: Bucket, state: State) -> None:
        self._squares: torch.Tensor | None = None  # mean squares of the last whitened gradient, by parameter
        self._options, self._bucket, self._state = options, bucket, state
        ones = torch.ones(bucket.numel, dtype=bucket.dtype, device=bucket.device)
        state.add(_SCALE, ones, bucket.numels, replicated=True)
        rows = torch.tensor([state.step, state.step, -1]).repeat(len(bucket.names))
        state.add(_SCHEDULE, rows, [3] * len(bucket.names), replicated=True)

    @property
    def scale(self) -> torch.Tensor:
        return self._state.tensors[_SCALE].tensor

    @property
    def schedule(self) -> torch.Tensor:
        """(parameters, 3), int64 on the CPU: the steps at which it began, of the next refresh, of the last update."""
        return self._state.tensors[_SCHEDULE].tensor.view(-1, 3)

    def start(self) -> None:
        """Let the bucket's parameters begin at the state's current step."""
        self.schedule[:, :_UPDATED] = self._state.step

    @property
    def is_refresh(self) -> bool:
        """Whether a refresh is due in this step."""
        return int(self.schedule[:, _NEXT].min()) <= self._state.step

    @property
    def is_warm(self) -> bool:
        """Whether the first steps are over, so that gradients are worth comparing with the second moment."""
        return int(self.schedule[:, _START].max()) + self._options.warmup_steps <= self._state.step

    def reduce(self, compressor: Compressor, grad: torch.Tensor) -> Program:
        """The compressor's program over the whitened gradient; its mean is returned in units of the gradient."""
        kernels, bound, state = for_device(grad.device), self._options.bound, self._state
        if compressor.converts_units() and self._bucket.hierarchy is None:
            self._squares = kernels.whitened_squares(grad, self.scale, self._bucket.numels)
            state.units = Units(self.scale, bound)
        else:
            self._squares = kernels.whiten(grad, self.scale, self._bucket.numels, bound)
        mean, new_state = yield from hierarchical.reduce(compressor, grad, self._bucket, state)
        state.units = None
        return mean.mul_(self.scale), new_state

    def observe(self, grad: torch.Tensor) -> None:
        """Compare a gradient that is sent dense with the second moment."""
        if self.is_warm:
            self._squares = for_device(grad.device).whitened_squares(grad, self.scale, self._bucket.numels)

    @property
    def band(self) -> Band:
        """How this rank's last gradient compares with the second moment. Zeros and NaN say nothing.

        The gradient of one of W workers has up to W times the variance of their mean, which is what v is made of.
        """
        if self._squares is None:
            return Band.NOTHING
        squares, band = self._squares.cpu(), self._options.band
        present = squares[squares > 0]
        if (present > band * self._bucket.world_size).any():
            return Band.ABOVE
        if (present < 1 / band).any():
            return Band.BELOW
        return Band.WITHIN if present.numel() else Band.NOTHING

    # The optimizer calls these with the index of a parameter in the bucket.

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.scale, self._state.tensors[_SCHEDULE].tensor]

    def part(self, index: int) -> torch.Tensor:
        """Return the scale of a parameter, as a 1-d view."""
        return self._bucket.split(self.scale)[index]

    def note_update(self, index: int) -> None:
        """Note that the scale of a parameter has been updated in this step."""
        self.schedule[index, _UPDATED] = self._state.step

    def age(self, index: int) -> int | None:
        """Return the number of steps since the scale of a parameter was updated; None if it never was."""
        updated = int(self.schedule[index, _UPDATED])
        return None if updated < 0 else self._state.step - updated

    # The reducer calls this.

    def end_step(self, *, is_taken: bool, is_refresh: bool, refresh_next: bool) -> None:
        """End a step, before the state is committed. A step that was taken plans the next refresh.

        Args:
            is_taken: whether the optimizer has stepped.
            is_refresh: whether the step was a refresh.
            refresh_next: whether the ranks have agreed that the next step is to be one.
        """
        if not is_taken:
            self._squares = None
            return
        step, options = self._state.step, self._options
        if is_refresh:
            ages = step + 1 - self.schedule[:, _START]
            intervals = (ages * options.refresh_growth).long().clamp(1, options.max_interval)
            intervals[ages < options.warmup_steps] = 1
            self.schedule[:, _NEXT] = step + intervals
        if refresh_next:
            self.schedule[:, _NEXT] = self.schedule[:, _NEXT].clamp(max=step + 1)
