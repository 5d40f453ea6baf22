"""Marchenko-Pastur law, spiked-model maps, Tracy-Widom quantiles: closed forms, torch fp64.

Notation: n samples of d channels, q = d / n, noise variance sigma2, population spike ell, sample eigenvalue lam.

For q > 1 the sample covariance has a share 1 - 1/q of exact zeros. `cdf` and `quantile` describe the whole law, atom
included; `median` describes the non-zero eigenvalues, because that is what an estimator compares with.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import RMTKDError


__all__ = [
    "cdf",
    "density",
    "edges",
    "eigenvector_overlap",
    "hard_threshold_coefficient",
    "median",
    "quantile",
    "sample_to_spike",
    "spike_to_sample",
    "spike_threshold",
    "tracy_widom_edge",
    "tracy_widom_quantile",
]

Number = TypeVar("Number", float, Tensor)


def edges(q: float, sigma2: float = 1.0) -> tuple[float, float]:
    """Lower and upper edge sigma2 (1 -+ sqrt q)^2 of the continuous part.

    Raises:
        RMTKDError: q or sigma2 not positive and finite.
    """
    _check(q, sigma2)
    return sigma2 * (1 - math.sqrt(q)) ** 2, sigma2 * (1 + math.sqrt(q)) ** 2


def density(x: Number, q: float, sigma2: float = 1.0) -> Number:
    """Density sqrt((b - x)(x - a)) / (2 pi q sigma2 x) of the continuous part; 0 outside [a, b].

    For q > 1 it integrates to 1/q: the atom at zero holds the rest.
    """
    low, high = edges(q, sigma2)
    value = _tensor(x)
    inside = ((high - value) * (value - low)).clamp_min(0).sqrt()
    return _like(x, torch.where(inside > 0, inside / (2 * math.pi * q * sigma2 * value), 0.0))


def cdf(x: Number, q: float, sigma2: float = 1.0) -> Number:
    """P[eigenvalue <= x], atom at zero included.

    Notes:
        With r = sqrt q and x = sigma2 (1 + q - 2 r cos t) the density becomes (2 / pi) sin^2 t / (1 + q - 2 r cos t)
        dt, whose integral from 0 to t is
        (2 / pi) [sin t / (2 r) + (1 + q) t / (4 q) - |1 - q| / (2 q) atan((1 + r) / |1 - r| tan(t / 2))].
    """
    low, high = edges(q, sigma2)
    value = _tensor(x)
    # t / 2 from both distances to the edges: the arc cosine of x would lose half the digits there.
    half = torch.atan2((value - low).clamp_min(0).sqrt(), (high - value).clamp_min(0).sqrt())
    total = _continuous_cdf(half, q) + max(0.0, 1 - 1 / q)
    return _like(x, torch.where(value < 0, 0.0, total.clamp(0, 1)))


def quantile(p: Number, q: float, sigma2: float = 1.0) -> Number:
    """Smallest x with cdf(x) >= p; 0 for p within the atom (q > 1, p <= 1 - 1/q).

    Raises:
        RMTKDError: p outside [0, 1].
    """
    low, high = edges(q, sigma2)
    share = _tensor(p)
    if not bool(((share >= 0) & (share <= 1)).all()):
        raise RMTKDError(f"Quantile level {p}: expected values in [0, 1].")
    atom = max(0.0, 1 - 1 / q)
    left, right = torch.zeros_like(share), torch.full_like(share, math.pi / 2)
    for _ in range(60):
        middle = (left + right) / 2
        below = _continuous_cdf(middle, q) + atom < share
        left, right = torch.where(below, middle, left), torch.where(below, right, middle)
    x = low + (high - low) * torch.sin((left + right) / 2).square()
    return _like(p, torch.where(share <= atom, 0.0 if atom else low, x))


def median(q: float, sigma2: float = 1.0) -> float:
    """Median mu_q sigma2 of the non-zero eigenvalues; for q <= 1 the median of the law itself.

    For q > 1 it equals q sigma2 mu_{1/q}: the non-zero eigenvalues are those of the n x n Gram matrix.
    """
    atom = max(0.0, 1 - 1 / q)
    return quantile(atom + (1 - atom) / 2, q, sigma2)


def spike_threshold(q: float, sigma2: float = 1.0) -> float:
    """Population bar sigma2 (1 + sqrt q): a spike below it leaves no trace outside the bulk (Baik, Ben Arous, Peche
    2005)."""
    _check(q, sigma2)
    return sigma2 * (1 + math.sqrt(q))


def spike_to_sample(ell: Number, q: float, sigma2: float = 1.0) -> Number:
    """Sample eigenvalue ell (1 + q sigma2 / (ell - sigma2)) of a population spike; the bulk edge below the
    threshold."""
    spike, bar = _tensor(ell), spike_threshold(q, sigma2)
    safe = spike.clamp_min(bar)
    return _like(ell, safe * (1 + q * sigma2 / (safe - sigma2)))


def sample_to_spike(lam: Number, q: float, sigma2: float = 1.0) -> Number:
    """Population spike behind a sample eigenvalue: the inverse of `spike_to_sample` above the bulk edge.

    At or below the edge nothing is identifiable and sigma2 is returned (the noise: what shrinkage would put there).

    Notes:
        ell = (b + sqrt(b^2 - 4 lam sigma2)) / 2 with b = lam + sigma2 (1 - q).
    """
    value, high = _tensor(lam), edges(q, sigma2)[1]
    b = value + sigma2 * (1 - q)
    ell = (b + (b.square() - 4 * value * sigma2).clamp_min(0).sqrt()) / 2
    return _like(lam, torch.where(value > high, ell, sigma2))


def eigenvector_overlap(ell: Number, q: float, sigma2: float = 1.0) -> Number:
    """Squared cosine between the population and the sample eigenvector of a spike, in [0, 1); 0 below the threshold.

    Notes:
        (1 - q s^2 / (ell - s)^2) / (1 + q s / (ell - s)), s = sigma2 (Paul 2007; Benaych-Georges, Nadakuditi 2011).
        Holds under the spiked model: white noise of variance sigma2 plus few spikes.
    """
    spike, bar = _tensor(ell), spike_threshold(q, sigma2)
    gap = spike.clamp_min(bar) - sigma2
    overlap = (1 - q * (sigma2 / gap).square()) / (1 + q * sigma2 / gap)
    return _like(ell, torch.where(spike > bar, overlap.clamp_min(0), 0.0))


def hard_threshold_coefficient(beta: float) -> float:
    """omega(beta): keep singular values above omega times their median (unknown noise).

    Args:
        beta: aspect ratio of the data matrix, in (0, 1].

    Notes:
        Gavish, Donoho, "The optimal hard threshold for singular values is 4 / sqrt 3", IEEE Trans. Inf. Theory 60
        (2014): omega = sqrt(2 (beta + 1) + 8 beta / (beta + 1 + sqrt(beta^2 + 14 beta + 1))) / sqrt(mu_beta), mu_beta
        exact.

    Raises:
        RMTKDError: beta outside (0, 1].
    """
    if not 0 < beta <= 1:
        raise RMTKDError(f"Aspect ratio beta={beta}: expected a number in (0, 1]; use 1 / beta for a wide matrix.")
    square = 2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1))
    return math.sqrt(square / median(beta))


# Quantiles of the Tracy-Widom law, beta = 1, computed from F(s) = det(1 - Ai(x + y + s)) on L2(0, inf) (Ferrari, Spohn
# 2005) with Bornemann's Gauss-Legendre discretisation (Math. Comp. 79, 2010), 80 nodes; the tests recompute them.
_TRACY_WIDOM = {
    1e-4: -5.249582,
    1e-3: -4.654198,
    0.005: -4.147877,
    0.01: -3.895433,
    0.025: -3.515854,
    0.05: -3.180380,
    0.1: -2.782428,
    0.15: -2.506702,
    0.2: -2.283163,
    0.3: -1.910380,
    0.4: -1.582765,
    0.5: -1.268575,
    0.6: -0.946330,
    0.7: -0.592287,
    0.8: -0.165313,
    0.85: 0.103838,
    0.9: 0.450143,
    0.95: 0.979316,
    0.975: 1.453771,
    0.99: 2.023449,
    0.995: 2.422327,
    0.999: 3.272196,
    0.9999: 4.359420,
    0.99999: 5.344296,
}


def tracy_widom_quantile(p: float) -> float:
    """Quantile of the Tracy-Widom law of real matrices (beta = 1): 0.979 at p = 0.95, 2.023 at p = 0.99.

    A monotone cubic (Fritsch, Carlson 1980) through the table above, in the normal quantile of p, where the law is
    nearly a straight line; error below 1e-3 for p in [1e-3, 0.9999], below 3e-3 beyond.

    Raises:
        RMTKDError: p outside [1e-4, 0.99999], where the table ends.
    """
    levels, values = list(_TRACY_WIDOM), list(_TRACY_WIDOM.values())
    if not levels[0] <= p <= levels[-1]:
        raise RMTKDError(f"Tracy-Widom level {p}: expected a number in [{levels[0]}, {levels[-1]}].")
    normal = NormalDist().inv_cdf
    return _monotone_cubic([normal(level) for level in levels], values, normal(p))


def tracy_widom_edge(n: float, d: float, sigma2: float = 1.0, alpha: float = 0.05) -> float:
    """Value that the largest eigenvalue of pure white noise exceeds with probability `alpha`.

    Notes:
        mu + s t_{1 - alpha}, mu = sigma2 (sqrt n + sqrt d)^2 / n, s = sigma2 (sqrt n + sqrt d) (n^-1/2 + d^-1/2)^(1/3)
        / n (Johnstone 2001).
    """
    _check(d / n, sigma2)
    root = math.sqrt(n) + math.sqrt(d)
    scale = root * (n**-0.5 + d**-0.5) ** (1 / 3) / n
    return sigma2 * (root**2 / n + scale * tracy_widom_quantile(1 - alpha))


def _continuous_cdf(half: Tensor, q: float) -> Tensor:
    """Integral of the continuous density up to the point at angle t = 2 `half`; formula in `cdf`."""
    r = math.sqrt(q)
    wrapped = torch.atan2((1 + r) * half.sin(), abs(1 - r) * half.cos())
    return (2 / math.pi) * ((2 * half).sin() / (2 * r) + (1 + q) * half / (2 * q) - abs(1 - q) * wrapped / (2 * q))


def _monotone_cubic(x: list[float], y: list[float], at: float) -> float:
    slopes = [(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)]
    # Harmonic means of neighbouring slopes keep the cubic monotone.
    tangents = [slopes[0], *(2 * a * b / (a + b) for a, b in zip(slopes, slopes[1:])), slopes[-1]]
    i = max(0, min(len(slopes) - 1, sum(node < at for node in x) - 1))
    h = x[i + 1] - x[i]
    t = (at - x[i]) / h
    return (
        y[i] * (1 + 2 * t) * (1 - t) ** 2
        + h * tangents[i] * t * (1 - t) ** 2
        + y[i + 1] * t**2 * (3 - 2 * t)
        + h * tangents[i + 1] * t**2 * (t - 1)
    )


def _check(q: float, sigma2: float) -> None:
    if not (0 < q < math.inf and 0 < sigma2 < math.inf):
        raise RMTKDError(f"q={q}, sigma2={sigma2}: expected both positive and finite (q = channels / samples).")


def _tensor(x: float | Tensor) -> Tensor:
    return x.double() if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)


def _like(x: float | Tensor, value: Tensor):
    """Numbers come back as floats, tensors as fp64 tensors."""
    return value if isinstance(x, Tensor) else float(value)
