"""The noise of gradients: how much those of single samples differ, in proportion to their mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from disttrain.reduction import SquaredNorms


class GradientNoise:
    """Estimates |G|^2, the squared norm of the true gradient, and tr(S), the trace of its covariance over samples.

    The gradient of n samples has the expected squared norm |G|^2 + tr(S)/n. So the norms of a part of a batch and of
    the whole give two equations, and unbiased estimates of both. They are noisy, and a ratio of averages is far nearer
    the truth than an average of ratios: each is smoothed for itself (McCandlish et al. 2018, arXiv:1812.06162).

    Args:
        smoothing: what one measurement leaves of the weight of all before it.

    Attributes:
        num_measured: measurements taken in.
    """

    def __init__(self, smoothing: float = 0.95) -> None:
        self.smoothing = smoothing
        self.num_measured = 0
        self._square_norm = self._trace = self._weight = 0.0

    def update(self, norms: SquaredNorms, sizes: Sequence[float], num_samples: int) -> bool:
        """Take in a measurement.

        Args:
            norms: as the reducer gives them.
            sizes: samples of each part whose squared norms were averaged, in their share of the mean gradient: those of
                each rank, or of the first backward pass of one process.
            num_samples: of the whole batch.

        Returns:
            Whether there was something to compare: not if the only part is the whole.
        """
        # A part's gradient is the mean over its n samples times n * len(sizes) / num_samples: its weight in the mean.
        count = len(sizes)
        of_square = sum((n * count / num_samples) ** 2 for n in sizes) / count
        of_trace = sum(n * (count / num_samples) ** 2 for n in sizes) / count
        spread = of_trace - of_square / num_samples
        if spread <= 1e-12 * of_trace:
            return False
        trace = (norms.local - of_square * norms.averaged) / spread
        self._add(norms.averaged - trace / num_samples, trace)
        return True

    def _add(self, square_norm: float, trace: float) -> None:
        if not math.isfinite(square_norm + trace):
            return
        keep = self.smoothing
        self._square_norm = keep * self._square_norm + (1 - keep) * square_norm
        self._trace = keep * self._trace + (1 - keep) * trace
        self._weight = keep * self._weight + (1 - keep)
        self.num_measured += 1

    @property
    def square_norm(self) -> float:
        """|G|^2, smoothed; 0 before anything was measured, and where the estimate is below."""
        return max(0.0, self._square_norm / self._weight) if self._weight else 0.0

    @property
    def trace(self) -> float:
        """tr(S), smoothed; likewise."""
        return max(0.0, self._trace / self._weight) if self._weight else 0.0

    @property
    def scale(self) -> float:
        """The simple noise scale tr(S) / |G|^2, in samples; inf where no gradient is to be seen in the noise."""
        if self.square_norm == 0:
            return math.inf if self.trace > 0 else 0.0
        return self.trace / self.square_norm

    def gain(self, reference: int, batch_size: int) -> float:
        """AdaScale's gain of a batch over the smaller ``reference``: from 1 to their ratio; 1 before measurements."""
        small, large = (self.square_norm + self.trace / size for size in (reference, batch_size))
        if large == 0 or batch_size <= reference:
            return 1.0
        return min(batch_size / reference, max(1.0, small / large))

    def state_dict(self) -> dict[str, float]:
        """As JSON can hold it."""
        return {
            "square_norm": self._square_norm,
            "trace": self._trace,
            "weight": self._weight,
            "num_measured": self.num_measured,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over what ``state_dict`` gave."""
        self._square_norm, self._trace, self._weight = state["square_norm"], state["trace"], state["weight"]
        self.num_measured = int(state["num_measured"])
