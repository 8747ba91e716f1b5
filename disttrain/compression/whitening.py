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

from collections.abc import Sequence
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


PREFIX = "whitening_"
"""Of the names of its tensors in a compressor's state."""
_SCALE, _SCHEDULE, _REFERENCE = f"{PREFIX}scale", f"{PREFIX}schedule", f"{PREFIX}reference"
_START, _NEXT, _UPDATED, _EPS, _SETTLED = range(5)  # columns of the schedule, which has a row for each parameter
_NEVER = 2.0**52
_LARGEST_REFERENCE = 1e4
_REFERENCE_WEIGHT = 0.1


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
        description="refresh in the next step if the mean square of a parameter's whitened gradient has grown by this "
        "factor on any worker, or fallen on all",
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
        self._options, self._bucket, self._state = options, bucket, state
        self._squares: torch.Tensor | None = None  # mean squares of the step's first whitened gradient, by parameter
        self._beginning: set[int] = set()
        count = len(bucket.names)
        ones = torch.ones(bucket.numel, dtype=bucket.dtype, device=bucket.device)
        state.add(_SCALE, ones, bucket.numels, replicated=True)
        state.add(_SCHEDULE, torch.zeros(5 * count, dtype=torch.float64), [5] * count, replicated=True)
        state.add(_REFERENCE, torch.zeros(count, dtype=torch.float64), [1] * count, replicated=False)
        self.restart()

    def restart(self) -> None:
        """Forget the scale, and let all parameters begin with their next gradient."""
        self._squares = None
        self.scale.fill_(1)
        self.schedule.copy_(torch.tensor([-1.0, self._state.step, -1.0, 0.0, 1.0], dtype=torch.float64))
        self._reference.zero_()

    @property
    def scale(self) -> torch.Tensor:
        return self._state.tensors[_SCALE].tensor

    @property
    def schedule(self) -> torch.Tensor:
        """(parameters, 5), float64 on the CPU.

        The step of the first gradient, or -1; the step of the next refresh; the optimizer's count of steps when the
        scale was last updated, or -1; the eps in it; 0 if the gradient's square was far from the second moment then.
        """
        return self._state.tensors[_SCHEDULE].tensor.view(-1, 5)

    @property
    def _reference(self) -> torch.Tensor:
        """Moving averages of the mean squares of this rank's whitened gradients, by parameter; 0 if unknown."""
        return self._state.tensors[_REFERENCE].tensor

    @property
    def is_refresh(self) -> bool:
        """Whether a refresh is due in this step."""
        return float(self.schedule[:, _NEXT].min()) <= self._state.step

    def reduce(self, compressor: Compressor, grad: torch.Tensor) -> Program:
        """The compressor's program over the whitened gradient; its mean is returned in units of the gradient."""
        kernels, bound, state = for_device(grad.device), self._options.bound, self._state
        converts = compressor.converts_units() and self._bucket.hierarchy is None
        if converts:
            squares = kernels.whitened_squares(grad, self.scale, self._bucket.numels)
            state.units = Units(self.scale, bound)
        else:
            squares = kernels.whiten(grad, self.scale, self._bucket.numels, bound)
        if self._squares is None:  # further gradients of a step, of other losses, are not comparable
            self._squares = squares
        mean, new_state = yield from hierarchical.reduce(compressor, grad, self._bucket, state)
        state.units = None
        return mean if converts else mean.mul_(self.scale), new_state

    @property
    def band(self) -> Band:
        """What this rank's gradient says in this step.

        Its mean square is compared with what was usual so far. This is about 1 for the mean over ranks, and up to their
        number for one rank; other values are due to clipping, or to a large eps. So what was usual only widens the band
        around these. Zeros and NaN say nothing.
        """
        if not self.schedule[:, _SETTLED].all():
            return Band.ABOVE
        if self._squares is None:
            return Band.NOTHING
        squares, factor, world_size = self._squares.cpu(), self._options.band, self._bucket.world_size
        is_known = self._reference > 0
        usual = self._reference.clamp(min=world_size, max=_LARGEST_REFERENCE * world_size)
        least = torch.where(is_known, self._reference, 1).clamp(max=1)
        if (squares > factor * usual).any():
            return Band.ABOVE
        if ((squares > 0) & (squares < least / factor)).any():
            return Band.BELOW
        return Band.WITHIN if (squares > 0).any() else Band.NOTHING

    # The optimizer calls these with the index of a parameter in the bucket.

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.scale, self._state.tensors[_SCHEDULE].tensor]

    def part(self, index: int) -> torch.Tensor:
        """Return the scale of a parameter, as a 1-d view."""
        return self._bucket.split(self.scale)[index]

    def updated(self, index: int) -> tuple[float, float]:
        """Return the optimizer's count of steps when a scale was last updated (-1: never), and the eps in it."""
        steps, eps = self.schedule[index, _UPDATED:_SETTLED].tolist()
        return steps, eps

    def note_update(self, index: int, steps: float, eps: float, change: float) -> None:
        """Note that the scale of a parameter has been updated.

        Args:
            index: of the parameter.
            steps: the optimizer's count of the parameter's steps.
            eps: the optimizer's.
            change: the square of the new gradient, relative to the second moment. Zero and NaN say nothing.
        """
        is_far = 0 < change < 1 / self._options.band or change > self._options.band
        self.schedule[index, _UPDATED:] = torch.tensor([steps, eps, 0.0 if is_far else 1.0], dtype=torch.float64)

    # The reducer calls these.

    def note_used(self, used: Sequence[bool]) -> None:
        """Let parameters that any rank has used for the first time begin."""
        waiting = (self.schedule[:, _START] < 0).nonzero().view(-1).tolist()
        self._beginning.update(index for index in waiting if used[index])

    def end_step(self, *, is_taken: bool, is_refresh: bool, refresh_next: bool) -> None:
        """End a step, before the state is committed. A step that was taken plans the next refresh.

        Args:
            is_taken: whether the optimizer has stepped.
            is_refresh: whether the step was a refresh.
            refresh_next: whether the ranks have agreed that the next step is to be one.
        """
        squares, self._squares = self._squares, None
        beginning, self._beginning = self._beginning, set()
        if not is_taken:
            return
        step, options, schedule = self._state.step, self._options, self.schedule
        for index in beginning:
            schedule[index, _START], schedule[index, _NEXT] = step, step + 1
        if is_refresh:
            ages = step + 1 - schedule[:, _START]
            intervals = (ages * options.refresh_growth).floor().clamp(1, options.max_interval)
            intervals[ages < options.warmup_steps] = 1
            schedule[:, _NEXT] = torch.where(schedule[:, _START] < 0, _NEVER, step + intervals)
        elif squares is not None:
            squares, before = squares.cpu(), self._reference
            is_known = (before > 0) & (squares > 0)
            before.copy_(torch.where(is_known, before.lerp(squares, _REFERENCE_WEIGHT), torch.maximum(before, squares)))
        if refresh_next:
            schedule[:, _NEXT] = schedule[:, _NEXT].clamp(max=step + 1)
            schedule[:, _SETTLED] = 1
