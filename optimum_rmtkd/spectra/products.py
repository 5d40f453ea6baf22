"""Products and eigenvectors of symmetric matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CalibrationError


__all__ = ["eigh", "symmetric_product"]

BLOCKS = 4  # 10 of 16 blocks are computed
BLOCKED_FROM = 512  # channels under which one product is quicker than ten


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """left.T @ right (dim, dim) where that is known to be symmetric, for (n, dim) inputs of one dtype.

    Torch has no symmetric rank-k update; computing the upper triangle of blocks and mirroring it saves three eighths.
    """
    dim = right.shape[1]
    if dim < BLOCKED_FROM:
        return left.T @ right
    result = right.new_empty(dim, dim)
    edges = [round(i * dim / BLOCKS) for i in range(BLOCKS + 1)]
    spans = [slice(a, b) for a, b in zip(edges, edges[1:])]
    for i, rows in enumerate(spans):
        for columns in spans[i:]:
            block = left[:, rows].T @ right[:, columns]
            result[rows, columns] = block
            if rows != columns:
                result[columns, rows] = block.T
    return result


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
