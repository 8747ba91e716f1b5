"""Low-rank factors of several matrices, one after the other in a 1-d tensor.

A matrix (rows, columns) has the factors p (rank, rows) and q (rank, columns), so that their rows are as long as the
columns and rows of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Shapes = Sequence[tuple[int, int, int]]  # (rows, columns, rank) of each matrix
Sizes = Sequence[tuple[int, int]]  # (rank, size) of each matrix's factor on one side
Factors = tuple[torch.Tensor, torch.Tensor]  # p and q


def p_sizes(shapes: Shapes) -> Sizes:
    return [(rank, rows) for rows, _, rank in shapes]


def q_sizes(shapes: Shapes) -> Sizes:
    return [(rank, columns) for _, columns, rank in shapes]


def split_factor(factor: torch.Tensor, sizes: Sizes) -> list[torch.Tensor]:
    """Return a (rank, size) view for each matrix."""
    parts = factor.split([rank * size for rank, size in sizes])
    return [part.view(shape) for part, shape in zip(parts, sizes, strict=True)]


def join_factor(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate what ``split_factor`` gave."""
    return torch.cat([part.reshape(-1) for part in parts])


def split_matrices(flat: torch.Tensor, shapes: Shapes) -> list[torch.Tensor]:
    """Return a (rows, columns) view for each matrix."""
    parts = flat.split([rows * columns for rows, columns, _ in shapes])
    return [part.view(rows, columns) for part, (rows, columns, _) in zip(parts, shapes, strict=True)]


def scaled(matrix: torch.Tensor) -> torch.Tensor:
    """Divide by the largest magnitude; zeros stay zeros."""
    largest = matrix.abs().amax()
    return matrix / torch.where(largest > 0, largest, 1.0)
