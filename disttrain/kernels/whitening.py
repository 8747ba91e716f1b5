"""The kernels of whitening in plain torch (``compression.whitening``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disttrain.kernels.sampling import sampled_rows

Tensor = torch.Tensor


class WhiteningKernels:
    """A part of ``Kernels``."""

    def whiten(self, grad: Tensor, scale: Tensor, sizes: Sequence[int], bound: float) -> Tensor:
        """Divide by ``scale`` and clamp to [-bound, bound], in place.

        Returns:
            The mean square of each of the parts with these ``sizes``, before clamping; float64.
        """
        grad.div_(scale)
        squares = _mean_squares(grad, sizes)
        grad.clamp_(-bound, bound)
        return squares

    def whitened_squares(self, grad: Tensor, scale: Tensor, sizes: Sequence[int]) -> Tensor:
        """What ``whiten`` returns; the gradient is left as it is. Of large parts a sample is taken."""
        pairs = zip(grad.split(list(sizes)), scale.split(list(sizes)), strict=True)
        whitened = [sampled_rows(part) / sampled_rows(divisors) for part, divisors in pairs]
        return _mean_squares(torch.cat([part.reshape(-1) for part in whitened]), [part.numel() for part in whitened])

    def hold_second_moment(
        self, scale: Tensor, grad: Tensor, factors: tuple[float, float, float, float], out: Tensor
    ) -> None:
        """Write ``max(whole (scale - eps)^2 - share grad^2, 0) / decay``; ``factors`` are (eps, whole, share, decay).

        An optimizer then updates ``out`` to ``decay out + share grad^2``: the larger of ``whole (scale - eps)^2`` and
        ``share grad^2``. All tensors have one shape, of any number of dimensions.
        """
        eps, whole, share, decay = factors
        held = (scale - eps).square_().mul_(whole).addcmul_(grad, grad.to(scale.dtype), value=-share)
        out.copy_(held.clamp_(min=0).div_(decay))


def _mean_squares(vector: Tensor, sizes: Sequence[int]) -> Tensor:
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in vector.split(list(sizes))]
    return torch.stack([norm.square() / max(1, size) for norm, size in zip(norms, sizes, strict=True)])
