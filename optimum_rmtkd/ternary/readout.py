"""The readout: ridge regression whose strength is chosen by exact leave-one-out error."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import RMTKDError


__all__ = ["Readout", "fit_readout", "one_hot", "probability_scale"]

GRID = torch.logspace(-8, 2, 21, dtype=torch.float64)


@dataclass(frozen=True)
class Readout:
    """A fitted linear map, prediction = h @ weight.T + bias.

    Attributes:
        weight: (outputs, d) fp64.
        bias: (outputs,) fp64.
        ridge: relative to the mean variance of the features.
        left_out: (n, outputs) fp64, the prediction of each sample by the fit on all others.
        error: mean squared leave-one-out error over the variance of the targets: 1 is no better than their mean.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    ridge: float
    left_out: torch.Tensor
    error: float


def fit_readout(h: torch.Tensor, y: torch.Tensor, ridge: float | None = None) -> Readout:
    """Least squares with a bias and a ridge on the weights.

    With the centred features H = U S V^T: weight = Y^T U S / (S^2 + lambda) V^T, and the leave-one-out residual of
    sample i is r_i / (1 - 1/n - sum_j U_ij^2 S_j^2 / (S_j^2 + lambda)) (Allen 1974, PRESS). Where the features
    interpolate (d >= n) both are as small as lambda, so they are summed from lambda / (S_j^2 + lambda) and not as
    differences to 1.

    Args:
        h: (n, d) features.
        y: (n, outputs) targets.
        ridge: None: the one of 21 between 1e-8 and 100 with the smallest leave-one-out error.

    Raises:
        RMTKDError: features that do not vary at all.
    """
    wide, targets = h.double(), y.double()
    n, d = wide.shape
    mean, middle = wide.mean(0), targets.mean(0)
    centred, wanted = wide - mean, targets - middle
    dual = n < d
    squares, basis = torch.linalg.eigh(centred @ centred.T if dual else centred.T @ centred)
    kept = squares > squares[-1] * max(n, d) * torch.finfo(torch.float64).eps
    if not float(squares[-1]) > 0 or not bool(kept.any()):
        raise RMTKDError(
            f"The {d} features in front of the readout are constant over {n} samples: nothing can be fitted."
        )
    squares, basis = squares[kept], basis[:, kept]
    singular = squares.sqrt()
    left = basis if dual else centred @ basis / singular  # shape: (n, rank)
    right = centred.T @ basis / singular if dual else basis  # shape: (d, rank)
    unit, projected, leverages = float(squares.sum()) / d, left.T @ wanted, left.square()

    beyond = wanted - left @ projected  # what no readout reaches
    free = (1 - 1 / n - leverages.sum(1)).clamp_min(0)

    def predict_left_out(strength: float) -> torch.Tensor:
        shrunk = strength * unit / (squares + strength * unit)
        residual = beyond + left @ (shrunk[:, None] * projected)
        return targets - residual / (free + leverages @ shrunk)[:, None]

    strengths = GRID.tolist() if ridge is None else [ridge]
    errors = [float((predict_left_out(s) - targets).square().mean()) for s in strengths]
    best = strengths[errors.index(min(errors))]
    weight = (right @ ((singular / (squares + best * unit))[:, None] * projected)).T
    spread = float(wanted.square().mean())
    return Readout(
        weight, middle - weight @ mean, best, predict_left_out(best), min(errors) / spread if spread else float("nan")
    )


def one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """(n,) class indices -> (n, classes) fp64."""
    return torch.nn.functional.one_hot(labels, classes).double()


def probability_scale(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Factor by which scores of a regression on one-hot labels become logits: the one with the smallest cross-entropy.

    Args:
        scores: (n, classes) leave-one-out predictions. Those of the fit itself would be too sure.
        labels: (n,) class indices.
    """
    factors = torch.logspace(-1, 3, 81, dtype=torch.float64)
    losses = [float(torch.nn.functional.cross_entropy(factor * scores, labels)) for factor in factors]
    return float(factors[losses.index(min(losses))])
