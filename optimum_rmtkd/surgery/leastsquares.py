"""Least squares from sums: what a layer still misses, regressed on what it reads, chunk by chunk. No rows are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import CalibrationError
from ..spectra.products import exact_matmul, packed_product, unpacked
from ..spectra.samples import work_dtype
from .linalg import JITTERS, check_finite, cholesky


__all__ = ["BatchStatistics", "LeastSquares", "NormFit", "least_squares_update", "norm_fit"]

RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # times the mean variance of what a layer reads
FP32 = torch.finfo(torch.float32).eps  # share of a matrix's size under which fp32 products tell nothing


@dataclass
class _Sums:
    """Of some rows, about the pivots of all: `packed` X'X (a, a), {name: X'R (a, o)}, {None: sum of X, name: of R};
    fp64, the sums over one chunk fp32."""

    count: int = 0
    strips: torch.Tensor | None = None
    cross: dict[str, torch.Tensor] = field(default_factory=dict)
    sums: dict[str | None, torch.Tensor] = field(default_factory=dict)

    def add(self, x: torch.Tensor, residuals: Mapping[str, torch.Tensor], intercept: bool) -> None:
        self.count += len(x)
        gram = packed_product(x, x)
        self.strips = gram.double() if self.strips is None else self.strips.add_(gram)
        for name, r in residuals.items():
            cross = x.T @ r
            self.cross[name] = self.cross[name].add_(cross) if name in self.cross else cross.double()
        for name, rows in {None: x, **residuals}.items() if intercept else ():
            here = rows.sum(0).double()
            self.sums[name] = self.sums[name].add_(here) if name in self.sums else here

    @property
    def gram(self) -> torch.Tensor:
        """X'X (a, a)."""
        return unpacked(self.strips, len(next(iter(self.cross.values()))))

    def of(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """X'X and X'R about the means of these rows; those means, zero without an intercept."""
        gram, cross = self.gram, self.cross[name]
        if not self.sums:
            return gram, cross, gram.new_zeros(len(gram)), cross.new_zeros(cross.shape[1])
        of_x, of_r = self.sums[None] / self.count, self.sums[name] / self.count
        gram = gram - self.count * torch.outer(of_x, of_x)
        return gram, cross - self.count * torch.outer(of_x, of_r), of_x, of_r

    def missed(self, name: str, update: torch.Tensor, shift: torch.Tensor) -> float:
        """|R - X D' - 1 e'|^2 over these rows, but for |R|^2; D (o, a), e (o,), about the pivots."""
        explained = update @ self.gram
        found = (explained * update).sum() - 2 * (update * self.cross[name].T).sum()
        if self.sums:
            found = found + self.count * shift.square().sum()
            found = found - 2 * shift @ (self.sums[name] - update @ self.sums[None])
        return float(found)


class LeastSquares:
    """The changes of linear layers that read the same X (n, a) and best explain what each of them still misses.

    Solves min |R - X D^T - 1 e^T|^2 + n lambda |D|^2, lambda = ridge * mean variance of X; ridge regression shrinks
    towards the layer as it is, not towards zero, so a layer that fits exactly is left exactly as it is. Products are
    fp32, so a ridge that is too small for what they can tell apart is raised, with a warning that says to what.

    Without a ridge, each layer has that of `RIDGES` which predicts best what it did not see: the first and the second
    half of each chunk explain each other (rows of one sentence are neighbours and alike, so that rows held out one by
    one would say little). Half as many rows stand twice the ridge. Where outputs have units of their own
    (not `by_outputs`), the ridge is the least: it would be a matter of units which of them the choice looks at.

    Sums are taken about the mean of the first chunk and moved to the mean of all by exact algebra in fp64, as in
    `spectra.SecondMoments`: so one pass over the data does.

    Args:
        ridge: see above; None: chosen for each layer.
        intercept: fit e, too; else it is zero.
        unit: this many neighbouring columns of X are measured in one unit, and lambda is taken from their variance
            alone: the result then does not depend on the units. None: all of them are.
        by_outputs: outputs are measured in one unit and may be compared. None: where columns are.
    """

    def __init__(self, ridge: float | None, intercept: bool, unit: int | None = None, by_outputs: bool | None = None):
        self.ridge, self.intercept, self.unit = ridge, intercept, unit
        self._pivots: dict[str | None, torch.Tensor] = {}  # of X under None, of each R under its name; fp64
        by_outputs = unit is None if by_outputs is None else by_outputs
        if ridge is None and not by_outputs:
            self.ridge = RIDGES[0]
        self._halves = [_Sums()] if self.ridge is not None else [_Sums(), _Sums()]

    @property
    def count(self) -> int:
        """Rows."""
        return sum(half.count for half in self._halves)

    def add(self, x: torch.Tensor, residuals: Mapping[str, torch.Tensor]) -> None:
        """A chunk of rows.

        Args:
            x: (n, a), any float dtype. Products in fp32, sums in fp64.
            residuals: {name: (n, o)}, o as it likes; the same names in every chunk.
        """
        if not len(x):
            return
        rows = {name: self._about_pivot(name, r) for name, r in residuals.items()}
        x, first, last = self._about_pivot(None, x), self._halves[0], self._halves[-1]
        half = (len(x) + (first.count < last.count)) // 2  # the odd row to where fewer are: chunks may be single rows
        spans = [slice(None)] if first is last else [slice(half), slice(half, None)]
        with exact_matmul(x.device):
            for sums, span in zip(self._halves, spans, strict=True):
                sums.add(x[span], {name: r[span] for name, r in rows.items()}, self.intercept)

    def _about_pivot(self, name: str | None, rows: torch.Tensor) -> torch.Tensor:
        if not self.intercept:
            return rows.float()
        if name not in self._pivots:
            # a mean as fp32 can state it: else what is subtracted and what is added back would differ
            self._pivots[name] = rows.double().mean(0).float().double()
        return rows.float() - self._pivots[name].float()

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
        ridge = self.ridge if self.ridge is not None else self._chosen(name, what)
        both = _both(self._halves, name)
        update, shift = self._solved(both, name, ridge, self._sizes_of(both, name), what)
        if not self.intercept:
            return update, shift
        return update, self._pivots[name] + shift - update @ self._pivots[None]

    def _chosen(self, name: str, what: str) -> float:
        """The ridge under which each half explains the other best; the largest where one half is empty."""
        if not all(half.count for half in self._halves):
            return RIDGES[-1]
        pairs, both = [self._halves, self._halves[::-1]], _both(self._halves, name)
        # the variance is that of all rows: a half may have none that fp32 products could tell
        each = [self._sizes_of(both, name) * (one.count / both.count) ** 0.5 for one, _ in pairs]

        def missed(ridge: float) -> float:
            fits = (self._solved(one, name, ridge, size, what) for (one, _), size in zip(pairs, each, strict=True))
            return sum(other.missed(name, *fit) for (_, other), fit in zip(pairs, fits, strict=True))

        return min(RIDGES, key=missed) / 2

    def _sizes_of(self, sums: _Sums, name: str) -> torch.Tensor:
        """(a,) root of the sum of squares of each column of X that its part of the ridge is taken from."""
        return _sizes(sums.of(name)[0].diagonal(), self.unit)

    def _solved(
        self, sums: _Sums, name: str, ridge: float, size: torch.Tensor, what: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """D and e about the pivots."""
        gram, cross, of_x, of_r = sums.of(name)
        check_finite(cross, what)
        gram = gram / torch.outer(size, size) + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        jitters = (0.0, *[jitter for jitter in JITTERS if jitter > max(ridge, FP32)])
        factor = cholesky(gram, f"{what}, ridge={ridge:g}", jitters, resolution=FP32)
        update = (torch.cholesky_solve(cross / size[:, None], factor) / size[:, None]).T
        return update, of_r - update @ of_x


def _both(halves: Sequence[_Sums], name: str) -> _Sums:
    """The sums of all rows, as far as one layer needs them."""
    if len(halves) == 1 or not halves[1].count:
        return halves[0]
    one, other = halves
    sums = {key: one.sums[key] + other.sums[key] for key in (None, name)} if one.sums else {}
    return _Sums(one.count + other.count, one.strips + other.strips, {name: one.cross[name] + other.cross[name]}, sums)


def least_squares_update(
    inputs: Iterable[torch.Tensor],
    residuals: Iterable[torch.Tensor],
    ridge: float | None,
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
    """Scale and shift per coordinate by least squares, from sums about the means of the first chunk, or about zero for
    a norm without a shift (`intercept`). Sums over a chunk are fp32 (fp64 of fp64 rows), sums over chunks fp64."""

    def __init__(self, intercept: bool = True) -> None:
        self.count, self.intercept = 0, intercept
        self._pivots: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sums: torch.Tensor | None = None  # (4, k): of u, t, u^2 and u t, about the pivots

    def add(self, normalised: torch.Tensor, target: torch.Tensor) -> None:
        """A chunk of rows, (n, k) each."""
        if not len(normalised):
            return
        u, t = (rows.to(work_dtype(rows)) for rows in (normalised, target))
        if self._pivots is None:
            # as fp32 can state it, see `LeastSquares`
            means = [rows.mean(0).float().double() for rows in (u, t)]
            self._pivots = tuple(means if self.intercept else map(torch.zeros_like, means))
            self._sums = torch.zeros(4, u.shape[1], dtype=torch.float64, device=u.device)
        u, t = u - self._pivots[0].to(u), t - self._pivots[1].to(t)
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


class BatchStatistics:
    """Mean and variance of each channel over all positions of all batches, in fp64, for the batch norm that reads
    them: the moving averages of training are those of another network after a cut."""

    def __init__(self) -> None:
        self.count, self._mean, self._squares = 0, None, None

    def add(self, x: torch.Tensor) -> None:
        """(samples, channels, height, width) of any float dtype."""
        rows = x.double().movedim(1, 0).flatten(1)
        count, mean = rows.shape[1], rows.mean(1)
        squares = (rows - mean[:, None]).square().sum(1)
        if self._mean is None:
            self.count, self._mean, self._squares = count, mean, squares
            return
        # Chan, Golub and LeVeque (1983)
        total, gap = self.count + count, mean - self._mean
        self._squares = self._squares + squares + gap.square() * self.count * count / total
        self._mean, self.count = self._mean + gap * count / total, total

    def install(self, norm: nn.BatchNorm2d) -> None:
        """Give them to a batch norm, in place, without a change of what it computes: its scale and shift follow. One
        without scale and shift, and channels that do not vary, keep what they have."""
        if norm.weight is None or norm.bias is None or self.count < 2:
            return
        variance = self._squares / (self.count - 1)
        with torch.no_grad():
            old_mean, old_variance = norm.running_mean.double(), norm.running_var.double()
            keep = variance <= 1e-9 * (variance + self._mean.square())
            mean, variance = torch.where(keep, old_mean, self._mean), torch.where(keep, old_variance, variance)
            slope = norm.weight.double() * (old_variance + norm.eps).rsqrt()
            norm.bias.copy_(norm.bias.double() + slope * (mean - old_mean))
            norm.weight.copy_(slope * (variance + norm.eps).sqrt())
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
