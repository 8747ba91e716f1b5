"""The kernels in plain torch: what each one means. Every other backend is tested against these.

Vectors are contiguous, 1-d, float32 or float64. ``grad + residual`` is what a rank wants to send; an encoder leaves in
``rest`` what the payload does not carry (the next residual), in the same pass where the backend can. ``residual`` may
be None (nothing is owed), ``rest`` may be None (what is not sent is dropped) or one of the inputs.

Codes of ``bits`` bits lie in planes: a block of n codes is cut into the widths whose sum is ``bits`` (3 = 2 + 1), and
each width w is stored as n w / 8 bytes, whose byte i holds the codes i, i + n w / 8, ... from the low bits up. So both
directions run over neighbouring memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Tensor = torch.Tensor
Shapes = Sequence[tuple[int, int, int]]  # (rows, columns, rank) of matrices
Sizes = Sequence[tuple[int, int]]  # (rank, size) of their factors on one side
Factors = tuple[Tensor, Tensor]  # p and q

RUN = 16  # neighbours that are sampled together, one cache line
_SAMPLES = 600  # sampled entries expected above an estimated threshold: an error of about 4 %


class Kernels:
    """Every kernel; a backend overrides those that it has faster. Safe to call from several threads."""

    def add(self, grad: Tensor, residual: Tensor | None, rest: Tensor | None) -> Tensor:
        """``grad + residual`` in ``rest``, or in a new tensor."""
        if residual is None:
            if rest is None:
                return grad.clone()
            return rest if rest.data_ptr() == grad.data_ptr() else rest.copy_(grad)
        return torch.add(grad, residual, out=rest)

    def copy_finite(self, source: Tensor, target: Tensor) -> bool | None:
        """Copy, and tell whether all numbers are finite; None where that is not known."""
        target.copy_(source)
        return None

    # Sparsification

    def take_largest(self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """The k entries of largest magnitude: (values, int32 indices in rising order). Of equals the first ones."""
        total = self.add(grad, residual, rest)
        magnitude = total.abs().nan_to_num_(nan=math.inf)  # k entries even then: others count on the size
        kth = magnitude.kthvalue(magnitude.numel() - k + 1).values
        above = magnitude > kth
        equal = magnitude == kth
        chosen = above | (equal & (equal.cumsum(0) <= k - above.sum()))
        return self.take_at(total, chosen.nonzero().view(-1).to(torch.int32), rest)

    def take_above(
        self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, threshold: float, capacity: int
    ) -> tuple[Tensor, Tensor, int]:
        """The entries of at least that magnitude, zeros left out: (values, int32 indices in rising order, how many).

        No more than the first ``capacity`` are taken; values and indices have that length and end in zeros.
        """
        total = self.add(grad, residual, rest)
        magnitude = total.abs()
        found = ((magnitude >= threshold) & (magnitude > 0)).nonzero().view(-1)
        values, indices = self.take_at(total, found[:capacity].to(torch.int32), rest)
        padding = capacity - values.numel()
        if padding:
            values, indices = (
                torch.nn.functional.pad(values, (0, padding)),
                torch.nn.functional.pad(indices, (0, padding)),
            )
        return values, indices, found.numel()

    def estimate_threshold(self, grad: Tensor, residual: Tensor | None, share: float) -> float:
        """The magnitude that about that share of all entries reaches, from runs of neighbours spread evenly."""
        runs, stride = sampled_runs(grad.numel(), share)
        places = (torch.arange(runs, device=grad.device) * stride).unsqueeze(1)
        places = (places + torch.arange(min(RUN, grad.numel()), device=grad.device)).view(-1)
        sample = (grad[places] if residual is None else grad[places] + residual[places]).abs()
        return float(sample.nan_to_num_(nan=math.inf).kthvalue(sampled_rank(sample.numel(), share) + 1).values)

    def take_at(self, total: Tensor, indices: Tensor, rest: Tensor | None) -> tuple[Tensor, Tensor]:
        """The entries at the given places of ``total`` (which is ``rest`` already, unless that is None)."""
        places = indices.long()
        values = total[places]
        if rest is not None:
            rest[places] = 0
        return values, indices

    def sparse_mean(
        self, values: Sequence[Tensor], indices: Sequence[Tensor], out: Tensor, *, add: bool = False
    ) -> None:
        """The mean of several sparse vectors, each with its own (values, indices)."""
        total = out if add else out.zero_()
        share = 1.0 / len(values)
        for part, places in zip(values, indices, strict=True):
            # Places within one payload are distinct (but for the zeros at its end), so no order of additions matters.
            total.index_add_(0, places.long(), part, alpha=share)

    # Uniform quantization

    def quantize(
        self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, bits: int, block: int, seed: int | None
    ) -> tuple[Tensor, Tensor]:
        """Codes of 2 to 8 bits and one scale a block: (uint8 planes, scales).

        With L = 2^(bits-1) - 1 levels on either side, scale = max |x| / L and the code is x / scale, rounded to
        nearest, or up or down at random so that its mean is right within 2^-16 (``seed`` given). Blocks of denormal
        numbers count as zeros.
        """
        total = self.add(grad, residual, rest)
        blocks = _blocks(total, block)
        levels = 2 ** (bits - 1) - 1
        scales = blocks.abs().amax(1) / levels
        scales = torch.where(scales >= torch.finfo(scales.dtype).tiny, scales, 0)
        inverse = torch.where(scales > 0, 1 / scales, 0).unsqueeze(1)
        codes = blocks * inverse
        codes = codes.round() if seed is None else (codes + _noise(seed, blocks)).floor()
        codes.clamp_(-levels, levels)
        if rest is not None:
            left = torch.addcmul(blocks, codes, scales.unsqueeze(1), value=-1)
            rest.copy_(left.view(-1)[: rest.numel()])
        return _to_planes((codes + levels).to(torch.uint8), bits), scales

    def dequantize_mean(
        self,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor],
        bits: int,
        block: int,
        out: Tensor,
        *,
        add: bool = False,
    ) -> None:
        """The mean of what several ``quantize`` stand for."""
        levels = 2 ** (bits - 1) - 1
        total = torch.zeros(scales[0].numel(), block, dtype=out.dtype, device=out.device)
        for packed, scale in zip(codes, scales, strict=True):
            values = _from_planes(packed.view(scale.numel(), -1), bits).to(out.dtype).sub_(levels)
            total += values * scale.unsqueeze(1)
        _finish_mean(total, len(codes), out, add)

    # Powers of two

    def natural(
        self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, block: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Every entry rounded at random to a power of two: (uint8 codes, scales).

        The scale is the power of two above the block's largest magnitude; a code is the sign bit and an m of 7 bits for
        2^(m - 127) times the scale, or for zero if m = 0. Means are right within 2^-16 of an entry. Blocks of denormal
        numbers count as zeros.
        """
        total = self.add(grad, residual, rest)
        blocks = _blocks(total, block)
        scales = _powers_above(blocks.abs().amax(1))
        inverse = torch.where(scales > 0, 1 / scales, 0).unsqueeze(1)
        # A float32 in [0, 1) has its exponent in the form wanted. Noise added to the bits of its fraction carries over
        # into the exponent with the right probability, and below the least exponent to it from zero.
        bits = (blocks.abs() * inverse).float().view(torch.int32)
        noise = (_noise(seed, blocks) * 2**16).to(torch.int32)
        exponents = ((bits + (noise << 7)) >> 23).clamp_(max=127)
        codes = (exponents | ((blocks < 0).to(torch.int32) << 7)).to(torch.uint8)
        if rest is not None:
            left = blocks - POWERS.to(blocks)[codes.long()] * scales.unsqueeze(1)
            rest.copy_(left.view(-1)[: rest.numel()])
        return codes.view(-1), scales

    def natural_mean(
        self, codes: Sequence[Tensor], scales: Sequence[Tensor], block: int, out: Tensor, *, add: bool = False
    ) -> None:
        """The mean of what several ``natural`` stand for."""
        powers = POWERS.to(out)
        total = torch.zeros(scales[0].numel(), block, dtype=out.dtype, device=out.device)
        for code, scale in zip(codes, scales, strict=True):
            total += powers[code.long()].view(scale.numel(), block) * scale.unsqueeze(1)
        _finish_mean(total, len(codes), out, add)

    # One bit

    def sign(self, grad: Tensor, residual: Tensor | None, rest: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
        """One bit an entry (set: negative) and the mean magnitude of each block: (uint8 planes, scales)."""
        total = self.add(grad, residual, rest)
        blocks = _blocks(total, block)
        sizes = torch.full((len(blocks),), block, dtype=blocks.dtype, device=blocks.device)
        sizes[-1] = total.numel() - (len(blocks) - 1) * block
        scales = blocks.abs().sum(1) / sizes
        negative = blocks < 0
        if rest is not None:
            left = blocks - torch.where(negative, -scales.unsqueeze(1), scales.unsqueeze(1))
            rest.copy_(left.view(-1)[: rest.numel()])
        return _to_planes(negative.to(torch.uint8), 1), scales

    def sign_mean(
        self, bits: Sequence[Tensor], scales: Sequence[Tensor], block: int, out: Tensor, *, add: bool = False
    ) -> None:
        """The mean of what several ``sign`` stand for."""
        total = torch.zeros(scales[0].numel(), block, dtype=out.dtype, device=out.device)
        for packed, scale in zip(bits, scales, strict=True):
            negative = _from_planes(packed.view(scale.numel(), -1), 1).bool()
            total += torch.where(negative, -scale.unsqueeze(1), scale.unsqueeze(1))
        _finish_mean(total, len(bits), out, add)

    def sign_vote(
        self, bits: Sequence[Tensor], weights: Sequence[Tensor], block: int, out: Tensor, *, add: bool = False
    ) -> None:
        """The sign, -1, 0 or 1, of the sum of several signs times the weights of their blocks."""
        vote = torch.empty_like(out) if add else out
        self.sign_mean(bits, weights, block, vote)
        vote.sign_()
        if add:
            out += vote

    def take_two_means(self, matrix: Tensor) -> Tensor:
        """Take out of each row's negative entries their mean, and of its others theirs: the means, (2, rows)."""
        negative = matrix < 0
        count = negative.sum(1)
        below = torch.where(negative, matrix, 0).sum(1) / count.clamp(min=1)
        above = torch.where(negative, 0, matrix).sum(1) / (matrix.shape[1] - count).clamp(min=1)
        matrix -= torch.where(negative, below.unsqueeze(1), above.unsqueeze(1))
        return torch.stack([below, above])

    def add_two_means(self, bits: Tensor, block: int, start: int, means: Tensor, matrix: Tensor) -> None:
        """Add to each entry (rows, columns) one of its row's two means (2, rows), the first where its bit is set.

        ``bits`` are as ``sign`` packs them; bit ``start`` is the first entry's.
        """
        codes = _from_planes(bits.view(-1, block // 8), 1).view(-1)[start : start + matrix.numel()]
        matrix += torch.where(codes.view(matrix.shape).bool(), means[0].unsqueeze(1), means[1].unsqueeze(1))

    # Low rank: all matrices of a bucket at once, one after the other in 1-d tensors; ``shapes`` has (rows, columns,
    # rank) of each. Factors p (rank, rows) and q (rank, columns) lie so that their rows are as long as the matrix's.

    def project(self, total: Tensor, residual: Tensor, q: Tensor, shapes: Shapes) -> Tensor:
        """``total += residual``; p, its products with q."""
        total += residual
        qs = split_factor(q, q_sizes(shapes))
        return join_factor([q @ matrix.T for matrix, q in zip(_matrices(total, shapes), qs, strict=True)])

    def project_back(self, total: Tensor, residual: Tensor | None, p: Tensor, shapes: Shapes) -> Tensor:
        """``total += residual``, if there is one; q, the products of p with it."""
        if residual is not None:
            total += residual
        ps = split_factor(p, p_sizes(shapes))
        return join_factor([p @ matrix for matrix, p in zip(_matrices(total, shapes), ps, strict=True)])

    def low_rank_rest(self, total: Tensor, own: Factors, mean: Factors, rest: Tensor, shapes: Shapes) -> None:
        """``rest = total - p^T q`` of the own factors (p, q); ``total`` becomes ``p^T q`` of the mean ones."""
        ps, mean_ps = (split_factor(p, p_sizes(shapes)) for p, _ in (own, mean))
        qs, mean_qs = (split_factor(q, q_sizes(shapes)) for _, q in (own, mean))
        parts = zip(_matrices(total, shapes), _matrices(rest, shapes), ps, qs, mean_ps, mean_qs, strict=True)
        for matrix, left, p, q, mean_p, mean_q in parts:
            torch.addmm(matrix, p.T, q, alpha=-1, out=left)
            torch.mm(mean_p.T, mean_q, out=matrix)

    def scale_factor(self, factor: Tensor, sizes: Sizes) -> Tensor:
        """The same directions, each factor's largest magnitude being 1, so that products neither overflow nor vanish.

        ``sizes`` are (rank, size) of each matrix's factor.
        """
        return join_factor([_scaled(part) for part in split_factor(factor, sizes)])

    def orthogonalize(self, factor: Tensor, sizes: Sizes) -> Tensor:
        """Orthonormal rows that span each factor's, also where these are zero or dependent."""
        return join_factor([torch.linalg.qr(_scaled(part).T).Q.T for part in split_factor(factor, sizes)])

    def fill_zero_rows(self, factor: Tensor, other: Tensor, sizes: Sizes) -> Tensor:
        """``factor``, but rows that are zero are those of ``other``."""
        pairs = zip(split_factor(factor, sizes), split_factor(other, sizes), strict=True)
        return join_factor([torch.where((part == 0).all(1, keepdim=True), before, part) for part, before in pairs])


def p_sizes(shapes: Shapes) -> Sizes:
    return [(rank, rows) for rows, _, rank in shapes]


def q_sizes(shapes: Shapes) -> Sizes:
    return [(rank, columns) for _, columns, rank in shapes]


def split_factor(factor: Tensor, sizes: Sizes) -> list[Tensor]:
    """A (rank, size) view for each matrix."""
    parts = factor.split([rank * size for rank, size in sizes])
    return [part.view(shape) for part, shape in zip(parts, sizes, strict=True)]


def join_factor(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _matrices(flat: Tensor, shapes: Shapes) -> list[Tensor]:
    parts = flat.split([rows * columns for rows, columns, _ in shapes])
    return [part.view(rows, columns) for part, (rows, columns, _) in zip(parts, shapes, strict=True)]


def _scaled(matrix: Tensor) -> Tensor:
    largest = matrix.abs().amax()
    return matrix / torch.where(largest > 0, largest, 1.0)


# What each code of ``natural`` stands for, in units of the scale.
POWERS = torch.tensor([sign * 2.0 ** (m - 127) if m else 0.0 for sign in (1, -1) for m in range(128)])


def _powers_above(largest: Tensor) -> Tensor:
    """The least power of two above each number, within the dtype's range; 0 for denormal numbers and zero."""
    info = torch.finfo(largest.dtype)
    exponents = torch.frexp(largest).exponent.clamp_(max=math.frexp(info.max)[1] - 1)
    return torch.where(largest >= info.tiny, torch.ldexp(torch.ones_like(largest), exponents), 0)


def sampled_runs(numel: int, share: float) -> tuple[int, int]:
    """How many runs of neighbours to sample for an estimate of the largest ``share``, and from one to the next."""
    runs = max(1, min(numel, int(_SAMPLES / share)) // RUN)
    return runs, numel // runs


def sampled_rank(size: int, share: float) -> int:
    """The place of the threshold in the sorted sample: ``share`` of it comes from there on."""
    return size - max(1, round(size * share))


def search_for_largest(numel: int, k: int) -> tuple[float, int] | None:
    """How to find the k largest without sorting all, or None where that is not worth it.

    They are among what reaches the threshold of this share of all entries, if it is no less than k and no more than
    that many.
    """
    return None if numel < 4096 or 4 * k > numel else (1.25 * k / numel, 2 * k + 1024)


def num_blocks(numel: int, block: int) -> int:
    return -(-numel // block)


def _blocks(vector: Tensor, block: int) -> Tensor:
    """(blocks, block), the last one filled up with zeros. A copy."""
    blocks = vector.new_zeros(num_blocks(vector.numel(), block), block)
    blocks.view(-1)[: vector.numel()] = vector
    return blocks


def _finish_mean(total: Tensor, count: int, out: Tensor, add: bool) -> None:
    mean = total.div_(count).view(-1)[: out.numel()]
    if add:
        out.add_(mean)
    else:
        out.copy_(mean)


def widths(bits: int) -> list[int]:
    """The powers of two that add up to ``bits``, largest first."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def _to_planes(codes: Tensor, bits: int) -> Tensor:
    """(blocks, n) codes, uint8 -> 1-d uint8 of blocks * n * bits / 8 bytes."""
    count, size = codes.shape
    parts, shift = [], 0
    for width in widths(bits):
        planes = (codes >> shift if shift else codes).bitwise_and(2**width - 1).view(count, 8 // width, -1)
        part = planes[:, 0].clone()
        for plane in range(1, 8 // width):
            part |= planes[:, plane] << (plane * width)
        assert part.shape[1] == size * width // 8
        parts.append(part)
        shift += width
    return torch.cat(parts, dim=1).view(-1)


def _from_planes(packed: Tensor, bits: int) -> Tensor:
    """(blocks, n * bits / 8) bytes -> (blocks, n) codes, uint8."""
    size = packed.shape[1] * 8 // bits
    codes = torch.zeros(packed.shape[0], size, dtype=torch.uint8, device=packed.device)
    shift = offset = 0
    for width in widths(bits):
        part = packed[:, offset : offset + size * width // 8]
        planes = [(part >> (plane * width)) & (2**width - 1) for plane in range(8 // width)]
        codes |= torch.cat(planes, dim=1) << shift
        shift += width
        offset += size * width // 8
    return codes


def _noise(seed: int, blocks: Tensor) -> Tensor:
    """Multiples of 2^-16 in [0, 1), uniform: a hash of seed and place (MurmurHash3's last step), alike on all backends.

    One hash serves two entries, half a block apart.
    """
    mask = 0xFFFFFFFF
    x = torch.arange(blocks.numel() // 2, dtype=torch.int64, device=blocks.device)
    x = (x * 0x9E3779B9 + seed) & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    x = (x ^ (x >> 16)).view(len(blocks), -1)
    return torch.cat([x & 0xFFFF, x >> 16], dim=1).to(blocks.dtype) * 2.0**-16
