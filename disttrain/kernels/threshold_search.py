"""Sparsification in few passes, for backends that can collect all entries above a threshold in one."""

from __future__ import annotations

from abc import abstractmethod

from disttrain.kernels.feedback import Feedback
from disttrain.kernels.reference import Kernels, Tensor
from disttrain.kernels.sampling import search_for_largest


class ThresholdSearchKernels(Kernels):
    """Find the k largest entries among those above an estimated threshold, instead of searching all."""

    @abstractmethod
    def _collect(
        self, grad: Tensor, feedback: Feedback | None, threshold: float, capacity: int, *, clear: bool
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Do what ``take_above`` does, but set entries of the sum to zero only if ``clear``.

        Returns:
            The sum ``grad + residual``, then values, indices and number of the entries, as ``take_above`` returns them.
        """

    @abstractmethod
    def _select(self, total: Tensor, values: Tensor, indices: Tensor, k: int, *, clear: bool) -> tuple[Tensor, Tensor]:
        """Return the k largest of the entries collected; if ``clear``, set them to zero in ``total``."""

    def take_largest(self, grad: Tensor, feedback: Feedback | None, k: int) -> tuple[Tensor, Tensor]:
        search = search_for_largest(grad.numel(), k)
        if search is None:
            return super().take_largest(grad, feedback, k)
        share, capacity = search
        threshold = self.estimate_threshold(grad, feedback, share)
        total, values, indices, count = self._collect(grad, feedback, threshold, capacity, clear=False)
        keeps_residual = feedback is not None
        if not k <= count <= capacity:
            return self._largest(total, k, clear=keeps_residual)
        return self._select(total, values[:count], indices[:count], k, clear=keeps_residual)

    def take_above(
        self, grad: Tensor, feedback: Feedback | None, threshold: float, capacity: int
    ) -> tuple[Tensor, Tensor, int]:
        return self._collect(grad, feedback, threshold, capacity, clear=feedback is not None)[1:]
