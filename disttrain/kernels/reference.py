"""The kernels in plain torch, which define what each one does. All other backends are tested against these.

Vectors are contiguous, 1-d, float32 or float64. Encoders take the gradient and, with error feedback, a ``Feedback``:
they then encode ``grad + residual`` and write the new residual in the same pass where the backend can. Without feedback
the gradient is only read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from disttrain.kernels.blocks import POWERS, from_planes, noise, powers_above, store_mean, to_blocks, to_planes
from disttrain.kernels.chunks import (
    POSITION_BITS,
    Chunks,
    Entries,
    decode_values,
    encode_values,
    pack_entries,
    unpack,
)
from disttrain.kernels.factors import (
    Factors,
    Shapes,
    Sizes,
    join_factor,
    p_sizes,
    q_sizes,
    scaled,
    split_factor,
    split_matrices,
)
from disttrain.kernels.feedback import Feedback
from disttrain.kernels.sampling import RUN, sampled_rank, sampled_runs
from disttrain.kernels.whitening import WhiteningKernels

Tensor = torch.Tensor


class Kernels(WhiteningKernels):
    """All kernels. A backend overrides those that it runs faster. Thread-safe."""

    def add_residual(self, grad: Tensor, feedback: Feedback | None) -> Tensor:
        """Return ``grad + residual``, stored in ``new_residual``; without a residual, ``grad`` itself."""
        if feedback is None or feedback.residual is None:
            return grad
        grad = grad if feedback.units is None else feedback.units.convert(grad)
        return torch.add(grad, feedback.residual, out=feedback.new_residual)

    def copy_finite(self, source: Tensor, target: Tensor) -> bool | None:
        """Copy, and return whether all numbers are finite; None if the backend does not know."""
        target.copy_(source)
        return None

    # Sparsification

    def take_largest(self, grad: Tensor, feedback: Feedback | None, k: int) -> tuple[Tensor, Tensor]:
        """Return the k entries of largest magnitude as (values, ascending int32 indices).

        Among equal magnitudes the first entries are taken.
        """
        return self._largest(self.add_residual(grad, feedback), k, clear=feedback is not None)

    def _largest(self, total: Tensor, k: int, *, clear: bool) -> tuple[Tensor, Tensor]:
        """``take_largest`` of a sum; if ``clear``, set the entries that are taken to zero."""
        magnitude = total.abs().nan_to_num_(nan=math.inf)  # k entries in any case, as other ranks expect this size
        kth = magnitude.kthvalue(magnitude.numel() - k + 1).values
        above = magnitude > kth
        equal = magnitude == kth
        chosen = above | (equal & (equal.cumsum(0) <= k - above.sum()))
        return _take(total, chosen.nonzero().view(-1), clear)

    def take_above(
        self, grad: Tensor, feedback: Feedback | None, threshold: float, capacity: int
    ) -> tuple[Tensor, Tensor, int]:
        """Return the entries of at least this magnitude, except zeros: (values, ascending int32 indices, their number).

        At most the first ``capacity`` entries are taken. Values and indices have that length, padded with zeros; the
        number returned includes the entries that did not fit.
        """
        total = self.add_residual(grad, feedback)
        magnitude = total.abs()
        found = ((magnitude >= threshold) & (magnitude > 0)).nonzero().view(-1)
        taken = _take(total, found[:capacity], clear=feedback is not None)
        padding = (0, max(0, capacity - found.numel()))
        values, indices = (torch.nn.functional.pad(tensor, padding) for tensor in taken)
        return values, indices, found.numel()

    def estimate_threshold(self, grad: Tensor, feedback: Feedback | None, share: float) -> float:
        """Estimate the magnitude that this share of all entries reaches, from a sample of evenly spaced runs.

        Only reads: nothing is written to ``new_residual``.
        """
        runs, stride = sampled_runs(grad.numel(), share)
        positions = (torch.arange(runs, device=grad.device) * stride).unsqueeze(1)
        positions = (positions + torch.arange(min(RUN, grad.numel()), device=grad.device)).view(-1)
        sample = grad[positions]
        if feedback is not None and feedback.residual is not None:
            sample = sample + feedback.residual[positions]
        magnitude = sample.abs().nan_to_num_(nan=math.inf)
        return float(magnitude.kthvalue(sampled_rank(magnitude.numel(), share) + 1).values)

    def sparse_mean(
        self, values: Sequence[Tensor], indices: Sequence[Tensor], out: Tensor, *, add: bool = False
    ) -> None:
        """Write, or add, the mean of several sparse vectors to ``out``."""
        total = out if add else out.zero_()
        share = 1.0 / len(values)
        for part, positions in zip(values, indices, strict=True):
            # Indices of one payload differ (except in its padding, which adds zeros), so any order gives the same sum.
            total.index_add_(0, positions.long(), part, alpha=share)

    # Sparsification in chunks

    def take_largest_of_chunks(
        self, grad: Tensor, feedback: Feedback | None, chunks: Chunks, value_bits: int | None
    ) -> Entries:
        """Take the entries of largest magnitude of each chunk, with values of 2, 4, 8 or 16 bits, or unrounded if None.

        16 bits are those of bfloat16, at most its largest number. Fewer bits are a sign and a level of an even grid
        from the smallest to the largest magnitude taken of the chunk. Among equal magnitudes the first entries are
        taken, and NaN counts as zero. No step waits for the device.
        """
        total = self.add_residual(grad, feedback)
        parts = []
        for rows, kept in chunks.rows(total):
            magnitude = rows.abs().nan_to_num_(nan=0.0, posinf=math.inf)
            order = magnitude.sort(dim=1, descending=True, stable=True).indices
            positions = order[:, :kept].sort(dim=1).values
            values = rows.gather(1, positions)
            coded, scales, sent = encode_values(values, value_bits)
            if feedback is not None:
                rows.scatter_(1, positions, values - sent)
            parts.append((coded.reshape(-1), scales, positions.to(torch.int16).view(-1)))
        coded, scales, positions = (torch.cat(tensors, dim=-1) for tensors in zip(*parts, strict=True))
        return pack_entries(coded, scales, positions, value_bits)

    def chunks_mean(
        self, parts: Sequence[Entries], chunks: Chunks, value_bits: int | None, out: Tensor, *, add: bool = False
    ) -> None:
        """Write, or add, the mean of several vectors encoded by ``take_largest_of_chunks`` to ``out``."""
        total = out if add else out.zero_()
        share, numel = 1.0 / len(parts), out.numel()
        starts = chunks.of_entries(chunks.starts(numel, out.device), numel)
        for part in parts:
            indices = starts + unpack(part.positions, len(starts), POSITION_BITS)
            total.index_add_(0, indices, decode_values(part, chunks, value_bits, out) * share)

    # Uniform quantization

    def quantize(
        self, grad: Tensor, feedback: Feedback | None, bits: int, block: int, seed: int | None
    ) -> tuple[Tensor, Tensor]:
        """Encode with 2 to 8 bits an entry and one scale a block: (uint8 planes, scales). Takes units.

        With L = 2^(bits-1) - 1 levels on either side, scale = max |x| / L. The code is x / scale rounded to nearest or,
        with a ``seed``, up or down at random so that its expectation is right within 2^-16. Blocks of subnormal numbers
        are encoded as zeros.
        """
        blocks = to_blocks(self.add_residual(grad, feedback), block)
        levels = 2 ** (bits - 1) - 1
        scales = blocks.abs().amax(1) / levels
        scales = torch.where(scales >= torch.finfo(scales.dtype).tiny, scales, 0)
        inverse = torch.where(scales > 0, 1 / scales, 0).unsqueeze(1)
        codes = blocks * inverse
        codes = codes.round() if seed is None else (codes + noise(seed, blocks)).floor()
        codes.clamp_(-levels, levels)
        if feedback is not None:
            _store(torch.addcmul(blocks, codes, scales.unsqueeze(1), value=-1), feedback.new_residual)
        return to_planes((codes + levels).to(torch.uint8), bits), scales

    def dequantize_mean(
        self,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor],
        bits: int,
        block: int,
        out: Tensor,
        *,
        add: bool = False,
        factors: Tensor | None = None,
    ) -> None:
        """Write, or add, the mean of several quantized vectors to ``out``, each entry times its factor."""
        levels = 2 ** (bits - 1) - 1
        total = torch.zeros(scales[0].numel(), block, dtype=out.dtype, device=out.device)
        for packed, scale in zip(codes, scales, strict=True):
            values = from_planes(packed.view(scale.numel(), -1), bits).to(out.dtype).sub_(levels)
            total += values * scale.unsqueeze(1)
        store_mean(total, len(codes), out, add, factors)

    # Powers of two

    def natural(self, grad: Tensor, feedback: Feedback | None, block: int, seed: int) -> tuple[Tensor, Tensor]:
        """Round every entry at random to a power of two: (uint8 codes, scales).

        The scale is the power of two above the block's largest magnitude. A code is the sign bit and an m of 7 bits:
        2^(m - 127) times the scale, or zero if m = 0. Expectations are right within 2^-16 of an entry. Blocks of
        subnormal numbers are encoded as zeros.
        """
        blocks = to_blocks(self.add_residual(grad, feedback), block)
        scales = powers_above(blocks.abs().amax(1))
        inverse = torch.where(scales > 0, 1 / scales, 0).unsqueeze(1)
        # The exponent bits of a float32 in [0, 1) are the m wanted. Noise added to the bits of its fraction carries
        # over into the exponent with the right probability, and also from zero to the smallest exponent.
        bits = (blocks.abs() * inverse).float().view(torch.int32)
        carry = (noise(seed, blocks) * 2**16).to(torch.int32)
        exponents = ((bits + (carry << 7)) >> 23).clamp_(max=127)
        codes = (exponents | ((blocks < 0).to(torch.int32) << 7)).to(torch.uint8)
        if feedback is not None:
            _store(blocks - POWERS.to(blocks)[codes.long()] * scales.unsqueeze(1), feedback.new_residual)
        return codes.view(-1), scales

    def natural_mean(
        self, codes: Sequence[Tensor], scales: Sequence[Tensor], block: int, out: Tensor, *, add: bool = False
    ) -> None:
        """Write, or add, the mean of several vectors encoded by ``natural`` to ``out``."""
        powers = POWERS.to(out)
        total = torch.zeros(scales[0].numel(), block, dtype=out.dtype, device=out.device)
        for code, scale in zip(codes, scales, strict=True):
            total += powers[code.long()].view(scale.numel(), block) * scale.unsqueeze(1)
        store_mean(total, len(codes), out, add)

    # One or two bits

    def sign(self, grad: Tensor, feedback: Feedback | None, block: int) -> tuple[Tensor, Tensor]:
        """Encode with one bit an entry (set: negative) and each block's mean magnitude: planes, scales. Takes units."""
        blocks = to_blocks(self.add_residual(grad, feedback), block)
        scales = blocks.abs().sum(1) / _sizes(blocks, grad.numel())
        negative = blocks < 0
        if feedback is not None:
            sent = torch.where(negative, -scales.unsqueeze(1), scales.unsqueeze(1))
            _store(blocks - sent, feedback.new_residual)
        return to_planes(negative.to(torch.uint8), 1), scales

    def sign_mean(
        self,
        bits: Sequence[Tensor],
        scales: Sequence[Tensor],
        block: int,
        out: Tensor,
        *,
        add: bool = False,
        factors: Tensor | None = None,
    ) -> None:
        """Write, or add, the mean of several vectors encoded by ``sign`` to ``out``, each entry times its factor."""
        total = torch.zeros(scales[0].numel(), block, dtype=out.dtype, device=out.device)
        for packed, scale in zip(bits, scales, strict=True):
            negative = from_planes(packed.view(scale.numel(), -1), 1).bool()
            total += torch.where(negative, -scale.unsqueeze(1), scale.unsqueeze(1))
        store_mean(total, len(bits), out, add, factors)

    def sign_and_level(self, grad: Tensor, feedback: Feedback | None, block: int) -> tuple[Tensor, Tensor]:
        """Encode with two bits an entry and two scales a block: (uint8 planes, scales (2 * blocks,)).

        The lower bit is set for negative entries, the upper one for magnitudes that reach the block's mean magnitude.
        The scales are the mean of the magnitudes below that mean, of every block, and then that of the others.
        """
        blocks = to_blocks(self.add_residual(grad, feedback), block)
        magnitude, sizes = blocks.abs(), _sizes(blocks, grad.numel())
        upper = magnitude >= (magnitude.sum(1) / sizes).unsqueeze(1)
        num_upper = torch.minimum(upper.sum(1), sizes)  # in a block of zeros the padding reaches the mean, too
        low = torch.where(upper, 0, magnitude).sum(1) / (sizes - num_upper).clamp_(min=1)
        high = torch.where(upper, magnitude, 0).sum(1) / num_upper.clamp_(min=1)
        negative = blocks < 0
        if feedback is not None:
            sent = torch.where(upper, high.unsqueeze(1), low.unsqueeze(1))
            _store(blocks - torch.where(negative, -sent, sent), feedback.new_residual)
        return to_planes(negative.to(torch.uint8) | (upper.to(torch.uint8) << 1), 2), torch.cat([low, high])

    def sign_and_level_mean(
        self, codes: Sequence[Tensor], scales: Sequence[Tensor], block: int, out: Tensor, *, add: bool = False
    ) -> None:
        """Write, or add, the mean of several vectors encoded by ``sign_and_level`` to ``out``."""
        total = torch.zeros(scales[0].numel() // 2, block, dtype=out.dtype, device=out.device)
        for packed, pair in zip(codes, scales, strict=True):
            code = from_planes(packed.view(len(total), -1), 2)
            low, high = pair.view(2, -1, 1)
            magnitude = torch.where(code >= 2, high, low)
            total += torch.where((code & 1).bool(), -magnitude, magnitude)
        store_mean(total, len(codes), out, add)

    def sign_vote(
        self, bits: Sequence[Tensor], weights: Sequence[Tensor], block: int, out: Tensor, *, add: bool = False
    ) -> None:
        """Write, or add, the sign (-1, 0 or 1) of the weighted sum of several signs. Each block has its own weight."""
        vote = torch.empty_like(out) if add else out
        self.sign_mean(bits, weights, block, vote)
        vote.sign_()
        if add:
            out += vote

    def take_two_means(self, matrix: Tensor) -> Tensor:
        """Subtract from each row's negative entries their mean, and from its other entries theirs.

        Returns:
            The means, (2, rows): those of the negative entries first.
        """
        negative = matrix < 0
        count = negative.sum(1)
        below = torch.where(negative, matrix, 0).sum(1) / count.clamp(min=1)
        above = torch.where(negative, 0, matrix).sum(1) / (matrix.shape[1] - count).clamp(min=1)
        matrix -= torch.where(negative, below.unsqueeze(1), above.unsqueeze(1))
        return torch.stack([below, above])

    def add_two_means(self, bits: Tensor, block: int, start: int, means: Tensor, matrix: Tensor) -> None:
        """Add to each entry one of its row's ``means`` (2, rows): the first where the entry's bit is set.

        ``bits`` are packed as by ``sign``; bit ``start`` belongs to the first entry of ``matrix`` (rows, columns).
        """
        codes = from_planes(bits.view(-1, block // 8), 1).view(-1)[start : start + matrix.numel()]
        matrix += torch.where(codes.view(matrix.shape).bool(), means[0].unsqueeze(1), means[1].unsqueeze(1))

    # Low rank: all matrices of a bucket at once, laid out as in ``factors``.

    def project(self, total: Tensor, residual: Tensor, q: Tensor, shapes: Shapes) -> Tensor:
        """Add the residual to ``total``, in place, and return p = q total^T."""
        total += residual
        qs = split_factor(q, q_sizes(shapes))
        return join_factor([q @ matrix.T for matrix, q in zip(split_matrices(total, shapes), qs, strict=True)])

    def project_back(self, total: Tensor, residual: Tensor | None, p: Tensor, shapes: Shapes) -> Tensor:
        """Add the residual, if any, to ``total``, in place, and return q = p total."""
        if residual is not None:
            total += residual
        ps = split_factor(p, p_sizes(shapes))
        return join_factor([p @ matrix for matrix, p in zip(split_matrices(total, shapes), ps, strict=True)])

    def low_rank_residual(
        self, total: Tensor, own: Factors, mean: Factors, new_residual: Tensor, shapes: Shapes
    ) -> None:
        """Write ``total - p^T q`` of the own factors to ``new_residual``, and p^T q of the mean ones to ``total``."""
        ps, mean_ps = (split_factor(p, p_sizes(shapes)) for p, _ in (own, mean))
        qs, mean_qs = (split_factor(q, q_sizes(shapes)) for _, q in (own, mean))
        matrices, residuals = split_matrices(total, shapes), split_matrices(new_residual, shapes)
        for matrix, residual, p, q, mean_p, mean_q in zip(matrices, residuals, ps, qs, mean_ps, mean_qs, strict=True):
            torch.addmm(matrix, p.T, q, alpha=-1, out=residual)
            torch.mm(mean_p.T, mean_q, out=matrix)

    def scale_factor(self, factor: Tensor, sizes: Sizes) -> Tensor:
        """Scale each factor to a largest magnitude of 1, so that products neither overflow nor vanish."""
        return join_factor([scaled(part) for part in split_factor(factor, sizes)])

    def orthogonalize(self, factor: Tensor, sizes: Sizes) -> Tensor:
        """Return orthonormal rows that span each factor's rows, even if these are zero or linearly dependent."""
        return join_factor([torch.linalg.qr(scaled(part).T).Q.T for part in split_factor(factor, sizes)])

    def fill_zero_rows(self, factor: Tensor, other: Tensor, sizes: Sizes) -> Tensor:
        """Return ``factor`` with its zero rows replaced by those of ``other``."""
        pairs = zip(split_factor(factor, sizes), split_factor(other, sizes), strict=True)
        return join_factor([torch.where((part == 0).all(1, keepdim=True), before, part) for part, before in pairs])


def _take(total: Tensor, positions: Tensor, clear: bool) -> tuple[Tensor, Tensor]:
    """Return values and int32 indices of the entries at ``positions``; if ``clear``, set these to zero."""
    values = total[positions]
    if clear:
        total[positions] = 0
    return values, positions.to(torch.int32)


def _sizes(blocks: Tensor, numel: int) -> Tensor:
    """Return the number of entries of each block, without the padding of the last one, in the blocks' dtype."""
    sizes = torch.full((len(blocks),), blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    sizes[-1] = numel - (len(blocks) - 1) * blocks.shape[1]
    return sizes


def _store(blocks: Tensor, vector: Tensor) -> None:
    """Write blocks to a vector, without their padding."""
    vector.copy_(blocks.view(-1)[: vector.numel()])
