"""Products and eigenvectors of symmetric matrices, and how they are held."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import CalibrationError


__all__ = [
    "BLOCKED_FROM",
    "diagonal_of",
    "eigh",
    "exact_matmul",
    "packed",
    "packed_product",
    "packed_size",
    "symmetric_product",
    "unpacked",
]

BLOCKED_FROM = 512  # channels under which one product is quicker than ten
STRIPS = 16  # 17 of 32 halves of a matrix are held


def _strips(dim: int) -> list[tuple[slice, slice]]:
    """(rows, columns) of strips that cover the upper triangle of a (dim, dim) matrix."""
    edges = [round(i * dim / STRIPS) for i in range(STRIPS + 1)]
    return [(slice(a, b), slice(a, dim)) for a, b in zip(edges, edges[1:])]


def packed(matrix: Tensor) -> Tensor:
    """Symmetric (dim, dim) -> (m,): strips of the upper triangle, m little over dim^2 / 2. Matrices of fewer than
    BLOCKED_FROM channels stay as they are."""
    dim = matrix.shape[-1]
    return matrix if dim < BLOCKED_FROM else torch.cat([matrix[strip].flatten() for strip in _strips(dim)])


def unpacked(strips: Tensor, dim: int) -> Tensor:
    """Inverse of `packed`; exactly symmetric where there are strips."""
    if dim < BLOCKED_FROM:
        return strips
    matrix, at = strips.new_empty(dim, dim), 0
    for rows, columns in _strips(dim):
        height, width = rows.stop - rows.start, dim - rows.start
        strip = strips[at : at + height * width].reshape(height, width)
        matrix[rows, columns] = strip
        matrix[columns, rows] = strip.T
        # a product of a block with itself may be unsymmetric by rounding
        matrix[rows, rows] = (strip[:, :height] + strip[:, :height].T) / 2
        at += height * width
    return matrix


def diagonal_of(strips: Tensor, dim: int) -> Tensor:
    """(dim,) the diagonal of what `packed` gives for a (dim, dim) matrix."""
    if dim < BLOCKED_FROM:
        return strips.diagonal()
    found, at = [], 0
    for rows, _ in _strips(dim):
        height, width = rows.stop - rows.start, dim - rows.start
        found.append(strips[at : at + height * width].view(height, width).diagonal())
        at += height * width
    return torch.cat(found)


def packed_product(left: Tensor, right: Tensor) -> Tensor:
    """`packed` of left.T @ right (dim, dim) where that is known to be symmetric, for (n, dim) inputs of one dtype.

    Torch has no symmetric rank-k update: the products of strips save nearly half, and nothing is mirrored or copied.
    """
    dim = right.shape[1]
    if dim < BLOCKED_FROM:
        return left.T @ right
    result, at = right.new_empty(packed_size(dim)), 0
    for rows, columns in _strips(dim):
        height, width = rows.stop - rows.start, dim - rows.start
        part = result[at : at + height * width].view(height, width)
        torch.mm(left[:, rows].T, right[:, columns], out=part)
        at += height * width
    return result


def packed_size(dim: int) -> int:
    """Entries that `packed` holds of a (dim, dim) matrix."""
    if dim < BLOCKED_FROM:
        return dim * dim
    return sum((rows.stop - rows.start) * (dim - rows.start) for rows, _ in _strips(dim))


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """left.T @ right (dim, dim) where that is known to be symmetric, for (n, dim) inputs of one dtype."""
    return unpacked(packed_product(left, right), right.shape[1])


def eigh(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Descending eigenvalues (d,) clipped at 0 and eigenvectors (d, d) of deterministic sign."""
    if not bool(torch.isfinite(covariance).all()):
        bad = int((~torch.isfinite(covariance)).sum())
        raise CalibrationError(
            f"{bad} of {covariance.numel()} entries of the covariance are NaN or infinite; expected finite sums."
        )
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    # An eigenvector is defined up to its sign only; LAPACK's choice differs between builds.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors)


@contextlib.contextmanager
def exact_matmul(device: torch.device) -> Iterator[None]:
    """Full fp32 products: no autocast, no TF32, whatever the surrounding training loop asked for."""
    before = torch.get_float32_matmul_precision()
    reset = device.type == "cuda" and before != "highest"
    if reset:
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if reset:
            torch.set_float32_matmul_precision(before)
