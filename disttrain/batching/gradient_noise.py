"""Gradient noise: the variance of single samples' gradients, and its ratio to the squared norm of their mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from disttrain.reduction import SquaredNorms


class GradientNoise:
    """Estimates |G|^2, the squared norm of the true gradient, and tr(S), the trace of its covariance over samples.

    The expected squared norm of the gradient of n samples is |G|^2 + tr(S)/n. The norms for a part of a batch and for
    the whole batch give two equations, and so unbiased estimates of both. The estimates are noisy, and a ratio of
    averages is far more accurate than an average of ratios, so each is smoothed on its own (McCandlish et al. 2018,
    arXiv:1812.06162).

    Args:
        smoothing: Decay of the moving averages per measurement.

    Attributes:
        num_measured: Number of measurements so far.
    """

    def __init__(self, smoothing: float = 0.95) -> None:
        self.smoothing = smoothing
        self.num_measured = 0
        self._square_norm = self._trace = self._weight = 0.0

    def update(self, norms: SquaredNorms, sizes: Sequence[float], num_samples: int) -> bool:
        """Add a measurement.

        Args:
            norms: Squared norms from the reducer (``DistributedOptimizer.norms``).
            sizes: Samples in each part whose squared norms were averaged: one part per rank, or, in one process, the
                first backward pass.
            num_samples: Samples in the whole batch.

        Returns:
            Whether there were two different sizes to compare: False if the only part is the whole batch.
        """
        # The gradient of a part of n samples is their mean times n * count / num_samples: its weight in the batch.
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
        """Smoothed estimate of |G|^2, at least 0; 0 before the first measurement."""
        return max(0.0, self._square_norm / self._weight) if self._weight else 0.0

    @property
    def trace(self) -> float:
        """Smoothed estimate of tr(S), at least 0; 0 before the first measurement."""
        return max(0.0, self._trace / self._weight) if self._weight else 0.0

    @property
    def scale(self) -> float:
        """The simple noise scale tr(S) / |G|^2, in samples; inf if the estimate of |G|^2 is 0 and that of tr(S) not."""
        if self.square_norm == 0:
            return math.inf if self.trace > 0 else 0.0
        return self.trace / self.square_norm

    def gain(self, reference: int, batch_size: int) -> float:
        """Return AdaScale's gain of a batch over a smaller ``reference``, from 1 to the ratio of both sizes.

        It is 1 before the first measurement.
        """
        small, large = (self.square_norm + self.trace / size for size in (reference, batch_size))
        if large == 0 or batch_size <= reference:
            return 1.0
        return min(batch_size / reference, max(1.0, small / large))

    def state_dict(self) -> dict[str, float]:
        """Return the state as JSON values."""
        return {
            "square_norm": self._square_norm,
            "trace": self._trace,
            "weight": self._weight,
            "num_measured": self.num_measured,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Load what ``state_dict`` returned."""
        self._square_norm, self._trace, self._weight = state["square_norm"], state["trace"], state["weight"]
        self.num_measured = int(state["num_measured"])
