"""QSGD: stochastic rounding to a few levels (Alistarh et al. 2017, arXiv:1610.02132)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from disttrain.compression.algorithms.quantizer import Quantizer


class QSGD(Quantizer):
    """Send sign and level of every entry in ``bits`` bits, rounded up or down at random.

    With s = 2^(bits-1) - 1 levels and m = max |x| of a block: Q(x)_i = m xi_i / s, where xi_i is s x_i / m rounded at
    random so that E[Q(x)] = x; E||Q(x) - x||^2 <= n / (4 s^2) m^2 for blocks of n. Unbiased, so error feedback is off
    by default. Scaled by the largest entry, as in the paper's experiments, not by the norm as in its analysis: the
    error is smaller at these widths. Differs from the paper in the code, of fixed width instead of Elias coding.
    """

    name = "qsgd"
    rounds_at_random: ClassVar[bool] = True

    bits: int = Field(default=4, ge=2, le=8, description="bits an entry, sign included")
    error_feedback: bool = Field(default=False, description="add the rounding error to the next gradient")

    @property
    def width(self) -> int:
        return self.bits
