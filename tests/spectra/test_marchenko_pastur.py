from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import airy

from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.spectra import marchenko_pastur as mp


RATIOS = [0.004, 0.1, 0.5, 1.0, 2.0, 7.5]


def integral(q, sigma2, upto):
    """Quadrature of the density with the square-root ends (and the pole at 0 for q = 1) taken out by substitution."""
    low, high = mp.edges(q, sigma2)
    upto = min(max(upto, low), high)
    end = math.asin(math.sqrt((upto - low) / (high - low)))

    def integrand(angle):
        x = low + (high - low) * math.sin(angle) ** 2
        return mp.density(x, q, sigma2) * (high - low) * 2 * math.sin(angle) * math.cos(angle)

    return quad(integrand, 0, end, epsabs=1e-12, epsrel=1e-12, limit=400)[0]


@pytest.mark.parametrize("sigma2", [1.0, 3.7])
@pytest.mark.parametrize("q", RATIOS)
def test_cdf_is_the_integral_of_the_density(q, sigma2):
    low, high = mp.edges(q, sigma2)
    atom = max(0.0, 1 - 1 / q)
    for share in (0.0, 0.01, 0.3, 0.5, 0.9, 1.0):
        x = low + share * (high - low)
        assert mp.cdf(x, q, sigma2) == pytest.approx(atom + integral(q, sigma2, x), abs=1e-8)
    assert mp.cdf(high * 1.1, q, sigma2) == pytest.approx(1, abs=1e-12)
    assert mp.cdf(-1.0, q, sigma2) == 0.0


@pytest.mark.parametrize("q", RATIOS)
def test_quantile_inverts_the_cdf(q):
    p = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    x = mp.quantile(p, q, 2.0)
    atom = max(0.0, 1 - 1 / q)
    torch.testing.assert_close(mp.cdf(x, q, 2.0), p.clamp_min(atom), rtol=0, atol=1e-9)
    assert bool((x[p < atom] == 0).all())
    assert mp.median(q, 2.0) == pytest.approx(mp.quantile(atom + (1 - atom) / 2, q, 2.0))


@pytest.mark.parametrize("q", RATIOS)
def test_mean_of_the_law_is_sigma2(q):
    low, high = mp.edges(q, 1.3)
    mean = quad(lambda x: x * mp.density(x, q, 1.3), low, high, epsabs=1e-12, limit=400)[0]
    assert mean == pytest.approx(1.3, abs=1e-6)


def test_median_above_one_is_that_of_the_gram_matrix():
    assert mp.median(4.0, 1.5) == pytest.approx(1.5 * 4 * mp.median(0.25), rel=1e-10)


@pytest.mark.parametrize("sigma2", [1.0, 0.2])
@pytest.mark.parametrize("q", [0.1, 0.5, 3.0])
def test_spike_maps_invert_each_other_and_meet_at_the_edge(q, sigma2):
    bar = mp.spike_threshold(q, sigma2)
    ell = bar * torch.tensor([1.001, 1.5, 4.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(
        mp.sample_to_spike(mp.spike_to_sample(ell, q, sigma2), q, sigma2), ell, rtol=1e-7, atol=0
    )
    assert mp.spike_to_sample(bar, q, sigma2) == pytest.approx(mp.edges(q, sigma2)[1])
    assert mp.spike_to_sample(0.5 * bar, q, sigma2) == pytest.approx(mp.edges(q, sigma2)[1])
    assert mp.sample_to_spike(mp.edges(q, sigma2)[1] * 0.9, q, sigma2) == sigma2
    overlaps = mp.eigenvector_overlap(torch.cat([torch.tensor([0.9 * bar]), ell]), q, sigma2)
    assert float(overlaps[0]) == 0 and bool((overlaps.diff() > 0).all()) and 0.9 < float(overlaps[-1]) < 1


@pytest.mark.parametrize("q", [0.4, 2.0])
def test_spiked_model_in_simulation(q):
    d, sigma2, ell = 500, 2.0, 12.0
    scale = torch.full((d,), sigma2**0.5, dtype=torch.float64)
    scale[0] = ell**0.5
    tops, overlaps = [], []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(int(d / q), d, generator=generator, dtype=torch.float64) * scale
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        tops.append(float(values[-1]))
        overlaps.append(float(vectors[0, -1] ** 2))
        below = float((values[values > 1e-9] < mp.median(q, sigma2)).double().mean())
        assert below == pytest.approx(0.5, abs=0.02)
    assert np.mean(tops) == pytest.approx(mp.spike_to_sample(ell, q, sigma2), rel=0.06)
    assert np.mean(overlaps) == pytest.approx(mp.eigenvector_overlap(ell, q, sigma2), abs=0.03)


def tracy_widom_cdf(s, nodes=60, length=16.0):
    """Fredholm determinant of the Airy kernel of beta = 1, the oracle of the table."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    x, w = (x + 1) * length / 2, np.sqrt(w * length / 2)
    return np.linalg.det(np.eye(nodes) - w[:, None] * airy(x[:, None] + x[None, :] + s)[0] * w[None, :])


@pytest.mark.parametrize("p", [2e-4, 0.01, 0.07, 0.25, 0.5, 0.77, 0.93, 0.95, 0.98, 0.99, 0.9995])
def test_tracy_widom_quantiles(p):
    exact = brentq(lambda s: tracy_widom_cdf(s) - p, -7, 7, xtol=1e-10)
    assert mp.tracy_widom_quantile(p) == pytest.approx(exact, abs=1e-3 if p in (0.5, 0.95, 0.99, 0.01) else 5e-3)


def test_tracy_widom_edge():
    assert mp.tracy_widom_quantile(0.95) == pytest.approx(0.979, abs=1e-3)
    assert mp.tracy_widom_quantile(0.99) == pytest.approx(2.023, abs=1e-3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 200, 50, generator=generator, dtype=torch.float64)
    tops = torch.linalg.eigvalsh(x.transpose(1, 2) @ x / 200)[:, -1]
    for alpha in (0.5, 0.1):
        share = float((tops > mp.tracy_widom_edge(200, 50, 1.0, alpha)).double().mean())
        assert share == pytest.approx(alpha, abs=0.08)


def test_hard_threshold_coefficient():
    """Values of the approximation printed in the paper, and 2.858 for square matrices."""
    assert mp.hard_threshold_coefficient(1.0) == pytest.approx(2.858, abs=2e-3)
    for beta in (0.1, 0.3, 0.7):
        approximate = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
        assert mp.hard_threshold_coefficient(beta) == pytest.approx(approximate, abs=0.02)


def test_bad_input():
    for call in (
        lambda: mp.edges(0.0),
        lambda: mp.edges(0.5, -1.0),
        lambda: mp.quantile(1.5, 0.5),
        lambda: mp.tracy_widom_quantile(1.0),
        lambda: mp.hard_threshold_coefficient(2.0),
    ):
        with pytest.raises(RMTKDError):
            call()
