"""Decompositions of moments that fail in words: diagnose, climb a ladder of jitters, say how far, or give up.

The ladder is that of linear_operator's `psd_safe_cholesky` (Gardner et al. 2018, GPyTorch): count what is not finite,
try as it is, add more and more to the diagonal, warn with the amount; give up with an error that names it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from ..errors import CalibrationError


__all__ = ["JITTERS", "check_finite", "cholesky", "eigh", "qr", "svd"]

logger = logging.getLogger(__name__)

# Of the mean of the diagonal. Products are fp32, so a moment of fewer samples than features has eigenvalues down to
# -1e-5 of it.
JITTERS = (1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3)

Found = TypeVar("Found")


def check_finite(matrix: torch.Tensor, what: str) -> None:
    """
    Raises:
        CalibrationError: NaN or infinite entries; says how many of how many.
    """
    bad = int((~matrix.isfinite()).sum())
    if bad:
        raise CalibrationError(
            f"{what}: {bad} of {matrix.numel()} entries of a matrix of shape {tuple(matrix.shape)} are NaN or "
            "infinite; expected finite ones. Look for weights or activations that overflow (float16), or for a "
            "diverged model, and check the calibration data."
        )


def _climb(
    matrix: torch.Tensor,
    what: str,
    steps: Iterable[float],
    attempt: Callable[[torch.Tensor], Found | None],
    asked: str,
) -> Found:
    """The first result of `attempt` on `matrix` (..., d, d) plus a step of the mean of its diagonal; None: it failed.

    Raises:
        CalibrationError: entries that are not finite; no step was enough.
    """
    check_finite(matrix, what)
    scale = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).abs().clamp_min(torch.finfo(matrix.dtype).tiny)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    steps = tuple(steps)
    for step in steps:
        found = attempt(matrix + step * scale[..., None, None] * eye if step else matrix)
        if found is not None:
            if step > steps[0]:
                logger.warning(
                    "%s: %s only with %g of the mean of its diagonal added to it (a matrix of shape %s).",
                    what,
                    asked,
                    step,
                    tuple(matrix.shape),
                )
            return found
    raise CalibrationError(
        f"{what}: a matrix of shape {tuple(matrix.shape)} is not {asked}, even with {steps[-1]:g} of the mean of its "
        "diagonal added to it; expected second moments of finite activations. Check the calibration data, or use more "
        "of it."
    )


def cholesky(
    matrix: torch.Tensor, what: str, steps: Iterable[float] = JITTERS, resolution: float = 0.0
) -> torch.Tensor:
    """Lower Cholesky factor of a symmetric positive (semi-)definite matrix (d, d).

    Args:
        what: what is computed, for messages.
        steps: jitters to try, as shares of the mean of the diagonal; the first is added in any case and silently.
        resolution: a pivot under this share of the mean of the diagonal counts as no pivot: it is what rounding has
            made of the products that the matrix is a sum of.

    Raises:
        CalibrationError: entries that are not finite, or no jitter makes it positive definite.
    """

    def attempt(jittered: torch.Tensor) -> torch.Tensor | None:
        factor, info = torch.linalg.cholesky_ex(jittered)
        least = resolution * jittered.diagonal().mean()
        return factor if not info and bool((factor.diagonal().square() >= least).all()) else None

    return _climb(matrix, what, steps, attempt, "positive definite")


def _or_none(decompose: Callable[[torch.Tensor], Found], matrix: torch.Tensor) -> Found | None:
    try:
        return decompose(matrix)
    except torch.linalg.LinAlgError:  # LAPACK's iteration has not converged
        return None


def eigh(matrix: torch.Tensor, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (..., d) ascending and eigenvectors (..., d, d) of a symmetric matrix; raises CalibrationError."""
    return _climb(
        matrix, what, (0.0, *JITTERS), lambda m: _or_none(torch.linalg.eigh, m), "decomposed into eigenvectors"
    )


def svd(matrix: torch.Tensor, what: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular value decomposition U, s, V^T of a square matrix (..., d, d); raises CalibrationError."""
    return _climb(
        matrix, what, (0.0, *JITTERS), lambda m: _or_none(torch.linalg.svd, m), "decomposed into singular vectors"
    )


def qr(matrix: torch.Tensor, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal and upper triangular factor of (..., d, k); Householder reflections never fail, but pass NaN on.

    Raises:
        CalibrationError: entries that are not finite.
    """
    check_finite(matrix, what)
    return torch.linalg.qr(matrix)
