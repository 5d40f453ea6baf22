"""What an edge estimator sees and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ..errors import RMTKDError
from .laws import CorrelatedSamples, EffectiveSize, IndependentSamples, NoiseLaw, TimeSpectrum


__all__ = ["DOUBT", "NULL_SHARE", "ROUNDOFF", "Edge", "Spectrum", "noise_below", "settled_noise"]

ROUNDOFF = 1e-10
NULL_SHARE = 1e-6
DOUBT = 1.25  # eigenvalue over the edge from which on it is signal beyond doubt


@dataclass(frozen=True)
class Spectrum:
    """What an edge estimator may look at.

    Attributes:
        eigenvalues: (d,) fp64, descending, >= 0, of the centred covariance.
        n: number of samples the random-matrix formulas use (may be an effective one).
        count: number of samples really seen; None means n. It bounds the number of non-zero eigenvalues.
        diagonal: (d,) fp64, variance of each channel, for `dpa`.
        vectors: (d, d) fp64, eigenvectors as columns in the order of the eigenvalues, for the deflation in `dpa`.
        null_eigenvalues: (d,) fp64, of the sign-flipped samples, for `signflip`.
        rows: number of samples that are there, where `n` is an effective one; None means n.
        times: (eigenvalues, shares) of the correlation between these samples, where it was measured.
    """

    eigenvalues: Tensor
    n: float
    count: float | None = None
    diagonal: Tensor | None = None
    vectors: Tensor | None = None
    null_eigenvalues: Tensor | None = None
    rows: float | None = None
    times: TimeSpectrum | None = None

    @property
    def dim(self) -> int:
        """Number of channels d."""
        return len(self.eigenvalues)

    @cached_property
    def positive(self) -> Tensor:
        """Eigenvalues that are not numerically null, descending: the only ones that medians and quantiles may see.

        Notes:
            Dropped: (i) beyond count - 1, exact zeros of a centred sample covariance with few samples; (ii) below
            ROUNDOFF (1e-10) of the largest: fp64 eigenvalues carry no digits there; (iii) below NULL_SHARE (1e-6) of
            the median of the rest: an exact null direction (LayerNorm subtracts the mean) is seen at about 1e-8 of the
            typical variance when the products are fp32, while a real direction a million times weaker than the median
            cannot matter.
        """
        count = self.n if self.count is None else self.count
        rest = self.eigenvalues[: max(1, min(self.dim, math.ceil(count) - 1))]
        rest = rest[rest > ROUNDOFF * rest[0]]
        if not len(rest):
            raise RMTKDError(
                f"All {self.dim} eigenvalues are zero: the activations are constant, there is no spectrum."
            )
        return rest[rest > NULL_SHARE * rest.median()]

    @property
    def null_count(self) -> int:
        """Number of numerically null eigenvalues."""
        return self.dim - len(self.positive)

    @property
    def width(self) -> int:
        """Channels the noise can live in: d less the structural null directions (unknowable when count <= d)."""
        count = self.n if self.count is None else self.count
        return self.dim if count <= self.dim else len(self.positive)

    @property
    def q(self) -> float:
        """width / n."""
        return self.width / self.n

    @property
    def samples(self) -> float:
        """Rows of the data matrix, whatever they are worth."""
        return self.n if self.rows is None else self.rows

    @cached_property
    def law(self) -> NoiseLaw:
        """Law of noise of unit variance."""
        return self.law_beyond(0)

    def law_beyond(self, rank: int) -> NoiseLaw:
        """Law of noise of unit variance in what `rank` signal directions leave."""
        width = max(1, self.width - rank)
        if self.times is not None:
            return CorrelatedSamples(width / self.samples, *self.times)
        return (IndependentSamples if math.isclose(self.samples, self.n, rel_tol=1e-9) else EffectiveSize)(
            width / self.n
        )

    @property
    def independent(self) -> bool:
        """Whether the samples count as independent and alike."""
        return type(self.law) is IndependentSamples


@dataclass(frozen=True)
class Edge:
    """Answer of an estimator: eigenvalues above `value` are signal.

    Attributes:
        value: the edge, in units of the eigenvalues.
        noise_variance: estimated variance of the noise per channel; NaN when the estimator has no noise model.
        details: JSON-able facts about how it was found. A `rank` entry, where present, is the exact rank (rules that
            count directions rather than compare with an edge); a `warning` entry is shown to the user.
    """

    value: float
    noise_variance: float
    details: dict[str, Any] = field(default_factory=dict)

    def rank(self, spectrum: Spectrum) -> int:
        """Number of directions kept, before any minimum or rounding."""
        exact = self.details.get("rank")
        return int((spectrum.positive > self.value).sum()) if exact is None else int(exact)


def noise_below(spectrum: Spectrum, edge: float) -> float:
    """Mean variance of the channels once everything above the edge is taken out."""
    rest = spectrum.positive[spectrum.positive <= edge]
    return float(rest.sum() / max(1, spectrum.width - (len(spectrum.positive) - len(rest))))


def settled_noise(spectrum: Spectrum, coefficient: float) -> float:
    """The largest noise variance s that is the mean of what lies below DOUBT times `coefficient` s.

    Dependence between samples spreads the eigenvalues of noise and moves their median, but not their mean. From above,
    and with some room over the edge: with more channels than the samples are worth a few directions hold much of the
    noise, and every one taken out by mistake lowers the mean onto the next.
    """
    sigma2, former = noise_below(spectrum, math.inf), math.inf
    while sigma2 < former:
        sigma2, former = noise_below(spectrum, DOUBT * coefficient * sigma2), sigma2
    return sigma2
