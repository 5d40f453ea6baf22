"""Laws of the eigenvalues of noise of unit variance: of independent samples, of samples correlated in time, and of an
effective number of samples alone.

Noise with the same correlation in time on every channel is X = B^{1/2} Z, Z (n, d) of independent entries and B (n, n)
the correlation between samples, tr B = n. Its covariance Z^T B Z / n is not Marchenko-Pastur: what counts is the whole
law of the eigenvalues of B. To second order that is the size n_eff = n / (tr B^2 / n): the eigenvalues of noise have
mean 1 and mean square 1 + (d / n) (tr B^2 / n), in place of 1 + d / n (Burda, Jurkiewicz, Waclaw, "Spectral moments of
correlated Wishart matrices", Phys. Rev. E 71 (2005) 026111).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import marchenko_pastur as mp


__all__ = ["CorrelatedSamples", "EffectiveSize", "IndependentSamples", "NoiseLaw", "TimeSpectrum", "spread"]

TimeSpectrum = tuple[tuple[float, ...], tuple[float, ...]]  # (eigenvalues, shares) of the correlation of samples

GRID = 800  # points of a numerical distribution function
IMAGINARY = 1e-7  # distance to the real axis at which a density is read, relative to the upper edge
ROUNDS = 100


@dataclass(frozen=True)
class IndependentSamples:
    """The Marchenko-Pastur law.

    Attributes:
        q: channels over samples.
    """

    q: float

    def edges(self) -> tuple[float, float]:
        """Lower and upper edge of the non-zero eigenvalues."""
        return mp.edges(self.q)

    def tracy_widom_edge(self, width: float, alpha: float) -> float:
        """Value that the largest of `width` eigenvalues exceeds with probability `alpha`."""
        return mp.tracy_widom_edge(width / self.q, width, 1.0, alpha)

    def hard_threshold(self) -> float:
        """Square of the optimal hard threshold for singular values, known noise: 2 (q + 1) + 8 q / (q + 1 + sqrt(q^2 +
        14 q + 1)) (Gavish, Donoho 2014), for any q."""
        q = self.q
        return 2 * (q + 1) + 8 * q / (q + 1 + math.sqrt(q * q + 14 * q + 1))

    def cdf(self, x: Tensor) -> Tensor:
        """P[eigenvalue <= x], fp64, the atom at zero included."""
        return mp.cdf(x, self.q)

    def quantile(self, p: float) -> float:
        """Quantile of the non-zero eigenvalues."""
        atom = max(0.0, 1 - 1 / self.q)
        return mp.quantile(atom + (1 - atom) * p, self.q)


class EffectiveSize(IndependentSamples):
    """A number of samples that somebody gave, or weights: right for the mean and the spread of the eigenvalues, hence
    for the edge; their shape is unknown (there may be more non-zero eigenvalues than the number says)."""


@dataclass(frozen=True)
class CorrelatedSamples:
    """The law of Z^T B Z / n.

    Attributes:
        q: channels over samples, d / n, of the samples that are there.
        times: eigenvalues of B, mean 1.
        shares: how large a part of B's eigenvalues each of them is; they add up to 1.

    Notes:
        Its Stieltjes transform solves z = -1/m + sum_j shares_j t_j / (1 + q t_j m) (Silverstein, Bai, J. Multivariate
        Anal. 54 (1995), with the roles of samples and channels exchanged). Edges are where dz/dm = 0 on the real line.
    """

    q: float
    times: tuple[float, ...]
    shares: tuple[float, ...]

    @functools.cached_property
    def _atoms(self) -> tuple[Tensor, Tensor]:
        """(eigenvalues of B that are not null, their shares)."""
        t, share = (torch.tensor(v, dtype=torch.float64) for v in (self.times, self.shares))
        kept = t > 1e-9 * t.max()
        return t[kept], share[kept]

    def _steepness(self, m: float) -> float:
        """q sum_j share_j (t_j m / (1 + q t_j m))^2: 1 where dz/dm = 0."""
        t, share = self._atoms
        return self.q * float((share * (t * m / (1 + self.q * t * m)).square()).sum())

    def _place(self, m: float) -> float:
        t, share = self._atoms
        return -1 / m + float((share * t / (1 + self.q * t * m)).sum())

    def _upper(self) -> float:
        """-m at the upper edge."""
        bound = 1 / (self.q * float(self._atoms[0].max()))
        return bound * _root(lambda w: self._steepness(-w * bound) - 1, 0.0, 1.0)

    @functools.cached_property
    def _edges(self) -> tuple[float, float]:
        t, share = self._atoms
        high = self._place(-self._upper())
        rank = float(share.sum()) / self.q
        if abs(rank - 1) < 1e-9:
            return 0.0, high
        if rank > 1:
            scale = 1 / (self.q * float(t.min()))
            log = _root(lambda e: self._steepness(scale * math.exp(e)) - 1, -60.0, 60.0)
            m = scale * math.exp(log)
        else:
            bound = 1 / (self.q * float(t.min()))
            log = _root(lambda e: 1 - self._steepness(-bound * (1 + math.exp(e))), -60.0, 60.0)
            m = -bound * (1 + math.exp(log))
        return max(0.0, self._place(m)), high

    def edges(self) -> tuple[float, float]:
        """Lower and upper edge of the non-zero eigenvalues."""
        return self._edges

    def tracy_widom_edge(self, width: float, alpha: float) -> float:
        """Value that the largest of `width` eigenvalues exceeds with probability `alpha` (scale: El Karoui 2007)."""
        t, share = self._atoms
        w = self._upper()
        # z'' / 2 at the edge, in the units of a population B seen by `width` samples
        cube = (1 / w**3) + self.q**2 * float((share * (t / (1 - self.q * t * w)).pow(3)).sum())
        return self._edges[1] + cube ** (1 / 3) * width ** (-2 / 3) * mp.tracy_widom_quantile(1 - alpha)

    def hard_threshold(self) -> float:
        """Square of the optimal hard threshold for singular values: y D'(y) / D(y) = -4 (Donoho, Gavish, Romanov 2023)
        for the D-transform of this law, in y^2 = z: w (q w z + 1 - q), w = -m."""
        t, share = self._atoms

        def steepness(w: float) -> float:
            z = self._place(-w)
            slope = 1 / (-1 / w**2 + self.q * float((share * (t / (1 - self.q * t * w)).square()).sum()))
            return z * (slope / w + self.q * (w + z * slope) / (self.q * w * z + 1 - self.q)) + 2

        edge = self._upper()
        # From z = infinity (w = 0, where it is 0 - 2 + 2 or above) down to the edge, where the slope is infinite.
        return self._place(-edge * _root(lambda w: -steepness(w * edge), 1e-9, 1.0))

    @functools.cached_property
    def _distribution(self) -> tuple[Tensor, Tensor]:
        """(points, P[0 < eigenvalue <= point]) over the support."""
        low, high = self._edges
        rank = min(1.0, float(self._atoms[1].sum()) / self.q)
        x = _points(low, high)
        density = self._stieltjes(x, IMAGINARY * high).imag / math.pi
        total = torch.cat((density.new_zeros(1), torch.cumulative_trapezoid(density, x)))
        return x, total / total[-1] * rank

    def _stieltjes(self, x: Tensor, height: float) -> Tensor:
        """m(x + i height) by Newton's method, followed down from a height where it is -1/z."""
        t, share = self._atoms
        levels = torch.logspace(math.log10(100 * float(x[-1])), math.log10(height), ROUNDS, dtype=torch.float64)
        m = -1 / (x + 1j * levels[0])
        for level in levels.tolist():
            z = x + 1j * level
            for _ in range(3):
                inner = 1 + self.q * t * m[:, None]
                value = -1 / m + (share * t / inner).sum(1) - z
                slope = 1 / m.square() - self.q * (share * (t / inner).square()).sum(1)
                step = value / slope
                m = m - step
        return m

    def cdf(self, x: Tensor) -> Tensor:
        """P[eigenvalue <= x], fp64, the atom at zero included."""
        points, total = self._distribution
        at = torch.searchsorted(points, x.double().contiguous()).clamp(1, len(points) - 1)
        left, right = points[at - 1], points[at]
        share = ((x - left) / (right - left)).clamp(0, 1)
        inside = total[at - 1] + share * (total[at] - total[at - 1])
        return torch.where(x < 0, 0.0, 1 - float(total[-1]) + inside)


NoiseLaw = IndependentSamples | CorrelatedSamples


def _points(low: float, high: float) -> Tensor:
    """Points of the support, dense at both edges, where densities are steep."""
    angle = torch.linspace(0, math.pi, GRID, dtype=torch.float64)
    low = max(low, 1e-8 * high)
    logs = math.log(low) + (math.log(high) - math.log(low)) * (1 - torch.cos(angle)) / 2
    return torch.exp(logs)


def _root(increasing, low: float, high: float) -> float:
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < 0 else (low, middle)
    return (low + high) / 2


def spread(times: TimeSpectrum) -> float:
    """tr B^2 / n = n / n_eff: 1 for independent samples."""
    t, share = (torch.tensor(value, dtype=torch.float64) for value in times)
    return float((share * t.square()).sum())
