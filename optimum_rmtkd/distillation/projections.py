"""Known relations between a student's residual stream and its teacher's."""

from __future__ import annotations

from collections.abc import Mapping

import torch


__all__ = ["STREAM", "compose", "projection_for"]

STREAM = "hidden"


def projection_for(projections: Mapping[str, torch.Tensor], path: str) -> torch.Tensor | None:
    """The matrix for the block at `path`: its own if one is known by that path, else the stream's; None: not cut."""
    return projections.get(path, projections.get(STREAM))


def compose(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two cuts in a row as one: stream @ first @ second.

    Args:
        first: name -> (d, k1), teacher to the model before this cut. A missing name means the stream was not cut.
        second: name -> (k1, k2), this cut.

    Returns:
        name -> (d, k2), fp32 (the product is taken in fp64).
    """
    product = {}
    for name in {**first, **second}:
        left, right = projection_for(first, name), projection_for(second, name)
        if left is None or right is None:
            product[name] = left if right is None else right
        else:
            product[name] = (left.double() @ right.double().to(left.device)).float()
    return product
