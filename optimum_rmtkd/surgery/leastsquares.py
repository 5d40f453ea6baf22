"""Least squares from sums: what a layer still misses, regressed on what it reads, chunk by chunk. No rows are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..errors import CalibrationError
from ..spectra.products import symmetric_product
from .linalg import JITTERS, check_finite, cholesky


__all__ = ["LeastSquares", "NormFit", "least_squares_update", "norm_fit"]

FP32 = torch.finfo(torch.float32).eps  # share of a matrix's size under which fp32 products tell nothing


class LeastSquares:
    """The changes of linear layers that read the same X (n, a) and best explain what each of them still misses.

    Solves min |R - X D^T - 1 e^T|^2 + n lambda |D|^2, lambda = ridge * mean variance of X; ridge regression shrinks
    towards the layer as it is, not towards zero, so a layer that fits exactly is left exactly as it is. Products are
    fp32, so a ridge that is too small for what they can tell apart is raised, with a warning that says to what.

    Sums are taken about the mean of the first chunk and moved to the mean of all by exact algebra in fp64, as in
    `spectra.SecondMoments`: so one pass over the data does.

    Args:
        ridge: see above.
        intercept: fit e, too; else it is zero.
        unit: this many neighbouring columns of X are measured in one unit, and lambda is taken from their variance
            alone: the result then does not depend on the units. None: all of them are.
    """

    def __init__(self, ridge: float, intercept: bool, unit: int | None = None):
        self.ridge, self.intercept, self.unit = ridge, intercept, unit
        self.count = 0
        self._pivots: dict[str | None, torch.Tensor] = {}  # of X under None, of each R under its name; fp64
        self._sums: dict[str | None, torch.Tensor] = {}
        self._gram: torch.Tensor | None = None
        self._cross: dict[str, torch.Tensor] = {}

    def add(self, x: torch.Tensor, residuals: Mapping[str, torch.Tensor]) -> None:
        """A chunk of rows.

        Args:
            x: (n, a), any float dtype. Products in fp32, sums in fp64.
            residuals: {name: (n, o)}, o as it likes; the same names in every chunk.
        """
        if not len(x):
            return
        self.count += len(x)
        x = self._about_pivot(None, x)
        gram = symmetric_product(x, x)
        self._gram = gram.double() if self._gram is None else self._gram.add_(gram)
        for name, residual in residuals.items():
            cross = x.T @ self._about_pivot(name, residual)
            self._cross[name] = self._cross[name].add_(cross) if name in self._cross else cross.double()

    def _about_pivot(self, name: str | None, rows: torch.Tensor) -> torch.Tensor:
        if not self.intercept:
            return rows.float()
        if name not in self._pivots:
            # a mean as fp32 can state it: else what is subtracted and what is added back would differ
            self._pivots[name] = rows.double().mean(0).float().double()
            self._sums[name] = torch.zeros_like(self._pivots[name])
        rows = rows.float() - self._pivots[name].float()
        self._sums[name] += rows.sum(0, dtype=torch.float64)
        return rows

    def solve(self, name: str, what: str = "Refit") -> tuple[torch.Tensor, torch.Tensor]:
        """The change of one layer.

        Args:
            what: what is fitted, for messages.

        Returns:
            D (o, a) and e (o,), fp64; e is zero without `intercept`.

        Raises:
            CalibrationError: inputs or residuals that are not finite; no rows.
        """
        if not self.count:
            raise CalibrationError(f"{what}: no rows to fit to, all positions of the calibration data are padding.")
        gram, cross = self._gram, self._cross[name]
        if self.intercept:
            of_x, of_r = self._sums[None] / self.count, self._sums[name] / self.count
            gram = gram - self.count * torch.outer(of_x, of_x)
            cross = cross - self.count * torch.outer(of_x, of_r)
        check_finite(cross, what)
        size = _sizes(gram.diagonal(), self.unit)
        gram = gram / torch.outer(size, size) + self.ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        jitters = (0.0, *[jitter for jitter in JITTERS if jitter > max(self.ridge, FP32)])
        factor = cholesky(gram, f"{what}, ridge={self.ridge:g}", jitters, resolution=FP32)
        update = (torch.cholesky_solve(cross / size[:, None], factor) / size[:, None]).T
        if not self.intercept:
            return update, update.new_zeros(len(update))
        return update, self._pivots[name] + of_r - update @ (self._pivots[None] + of_x)


def least_squares_update(
    inputs: Iterable[torch.Tensor],
    residuals: Iterable[torch.Tensor],
    ridge: float,
    intercept: bool,
    unit: int | None = None,
    what: str = "Refit",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`LeastSquares` of one layer over chunks of rows (n_i, a) and (n_i, o)."""
    sums = LeastSquares(ridge, intercept, unit)
    for x, r in zip(inputs, residuals, strict=True):
        sums.add(x, {"": r})
    return sums.solve("", what)


def _sizes(squares: torch.Tensor, unit: int | None) -> torch.Tensor:
    """(a,) root of the mean of the sums of squares (a,), over each `unit` columns; of all where they are silent."""
    mean = squares.mean().clamp_min(torch.finfo(torch.float64).tiny)
    if unit is None:
        return mean.sqrt().expand(len(squares))
    each = squares.reshape(-1, unit).mean(1).repeat_interleave(unit)
    return torch.where(each > 0, each, mean).sqrt()


class NormFit:
    """Scale and shift per coordinate by least squares, from fp64 sums about the means of the first chunk; about zero
    for a norm without a shift (`intercept`)."""

    def __init__(self, intercept: bool = True) -> None:
        self.count, self.intercept = 0, intercept
        self._pivots: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sums: torch.Tensor | None = None  # (4, k): of u, t, u^2 and u t, about the pivots

    def add(self, normalised: torch.Tensor, target: torch.Tensor) -> None:
        """A chunk of rows, (n, k) each."""
        if not len(normalised):
            return
        u, t = normalised.double(), target.double()
        if self._pivots is None:
            self._pivots = (u.mean(0), t.mean(0)) if self.intercept else (u.new_zeros(()), u.new_zeros(()))
            self._sums = torch.zeros(4, u.shape[1], dtype=torch.float64, device=u.device)
        u, t = u - self._pivots[0], t - self._pivots[1]
        self._sums += torch.stack([u.sum(0), t.sum(0), u.square().sum(0), (u * t).sum(0)])
        self.count += len(u)

    def solve(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """scale (k,), shift (k,) fp64, and usable (k,) bool: coordinates that vary enough to be fitted."""
        of_u, of_t, squares, products = self._sums / self.count
        if not self.intercept:
            scale = products / squares.clamp_min(1e-12)
            return scale, torch.zeros_like(scale), squares > 1e-9
        variance = (squares - of_u.square()).clamp_min(0)
        scale = (products - of_u * of_t) / variance.clamp_min(1e-12)
        mean_u, mean_t = self._pivots[0] + of_u, self._pivots[1] + of_t
        return scale, mean_t - scale * mean_u, variance > 1e-9


def norm_fit(normalised: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`NormFit` of all rows (n, k) at once."""
    fit = NormFit()
    fit.add(normalised, target)
    return fit.solve()
