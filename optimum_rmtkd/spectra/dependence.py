"""How strongly samples depend on each other in time, as far as it widens the noise."""

from __future__ import annotations

import math

from torch import Tensor

from .autocorrelation import bulk_autocorrelation, shift_lagged_sums, time_spectrum
from .laws import CorrelatedSamples, TimeSpectrum
from .spectrum import DOUBT, Spectrum


__all__ = ["time_spectrum_of"]


def time_spectrum_of(
    sums: dict[str, Tensor], offset: Tensor, eigenvalues: Tensor, vectors: Tensor, count: int
) -> TimeSpectrum | None:
    """The law of the eigenvalues of the correlation between samples; None if nothing is known of it.

    Args:
        sums: with the lagged sums of autocorrelation.py.
        offset: (dim,) mean about the pivot.
        eigenvalues: (dim,) of the covariance, descending.
        vectors: (dim, dim) its eigenvectors.
        count: number of samples.

    Notes:
        Signal has its own correlation in time and would hide that of the noise. So leading directions are left out,
        one after the other (an eighth more at a time), until what remains is explained by the law of its own
        correlation: no eigenvalue above its edge beyond doubt. The first number that does is wanted, for a bulk
        without its upper end looks too little correlated, and hardly explains itself again. In a simulation of 12 to
        15 spikes (AR(0.8) and AR(0.9) noise, channels over samples 0.5 to 1.9) the largest of the rest was at 1.5 to
        10 times the edge while two or more spikes were among it, at 0.97 to 1.16 without, and at 1 to 2 inside the
        bulk. Where nothing is explained, up to half of the directions, the closest counts.
    """
    spectrum = Spectrum(eigenvalues, n=count)
    values = spectrum.positive
    products, pairs = shift_lagged_sums(sums, -offset)["lag_products"], sums["lag_pairs"]
    closest, found, rank = math.inf, None, 0
    while closest > DOUBT and rank <= len(values) // 2:
        rho = bulk_autocorrelation(products, pairs, vectors[:, : len(values)], rank)
        if rho is None:
            break
        times, width = time_spectrum(rho, pairs), spectrum.width - rank
        excess = (
            float(values[rank] / values[rank:].sum()) * width / CorrelatedSamples(width / count, *times).edges()[1]
        )
        if excess < closest:
            closest, found = excess, times
        rank += max(1, rank // 8)
    return found
