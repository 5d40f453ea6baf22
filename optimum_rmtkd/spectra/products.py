"""Matrix products that only symmetric results allow."""

from __future__ import annotations

from torch import Tensor


__all__ = ["symmetric_product"]

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
