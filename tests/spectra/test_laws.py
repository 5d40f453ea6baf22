from __future__ import annotations

import math

import pytest
import torch

from optimum_rmtkd.spectra import marchenko_pastur as mp
from optimum_rmtkd.spectra.laws import CorrelatedSamples, EffectiveSize, IndependentSamples, spread

from .conftest import autoregressive


def toeplitz(length, rho):
    lag = torch.arange(length)
    matrix = torch.tensor([rho(k) for k in range(length)], dtype=torch.float64)[(lag[:, None] - lag[None, :]).abs()]
    return tuple(torch.linalg.eigvalsh(matrix).clamp_min(0).tolist()), (1 / length,) * length


@pytest.mark.parametrize("q", [0.01, 0.3, 0.999, 1.0, 2.5, 8.0])
def test_independent_samples_are_a_special_case(q):
    """All eigenvalues of B are 1: every number must be that of the closed forms."""
    plain, general = IndependentSamples(q), CorrelatedSamples(q, (1.0, 1.0), (0.25, 0.75))
    assert general.edges() == pytest.approx(plain.edges(), rel=1e-9, abs=1e-9)
    assert general.hard_threshold() == pytest.approx(plain.hard_threshold(), rel=1e-9)
    assert general.tracy_widom_edge(200, 0.05) == pytest.approx(plain.tracy_widom_edge(200, 0.05), rel=1e-9)
    x = torch.linspace(plain.edges()[0], plain.edges()[1], 50, dtype=torch.float64)
    torch.testing.assert_close(general.cdf(x), plain.cdf(x), rtol=0, atol=2e-3)


@pytest.mark.parametrize("beta", [0.05, 0.4, 1.0, 3.0])
def test_hard_threshold_is_gavish_and_donohos(beta):
    narrow = min(beta, 1 / beta)
    expected = mp.hard_threshold_coefficient(narrow) ** 2 * mp.median(narrow) * max(1.0, beta)
    assert IndependentSamples(beta).hard_threshold() == pytest.approx(expected, rel=1e-12)


# Audited with other seeds: top eigenvalues 1.821, 1.223, 1.479, 1.104 of pure AR(0.8) noise in sequences of 40.
@pytest.mark.parametrize(
    "n, d, top", [(4000, 100, 1.821), (40000, 100, 1.223), (20000, 200, 1.479), (80000, 50, 1.104)]
)
def test_edge_of_autoregressive_noise_is_close_above_the_top_eigenvalues(n, d, top):
    edge = CorrelatedSamples(d / n, *toeplitz(40, lambda k: 0.8**k)).edges()[1]
    assert top < edge < top * 1.005
    # Marchenko-Pastur with n_eff is right to second order only
    n_eff = n / spread(toeplitz(40, lambda k: 0.8**k))
    assert mp.edges(d / n_eff)[1] < edge


@pytest.mark.parametrize(
    "rho, length, n, d",
    [
        (lambda k: 0.8**k, 40, 4000, 200),
        (lambda k: 0.9**k, 8, 800, 600),
        (lambda k: 0.8**k, 40, 400, 800),
        (lambda k: (-0.6) ** k, 20, 2000, 400),
        (lambda k: 0.7 if k else 1.0, 10, 3000, 300),
    ],
    ids=["many", "few", "fewer than channels", "alternating", "shared by a sequence"],
)
def test_law_of_simulated_noise(rho, length, n, d):
    times = toeplitz(length, rho)
    law, lag = CorrelatedSamples(d / n, *times), torch.arange(length)
    matrix = torch.tensor([rho(k) for k in range(length)], dtype=torch.float64)[(lag[:, None] - lag[None, :]).abs()]
    z = torch.randn(n // length, length, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.einsum("ij,bjd->bid", torch.linalg.cholesky(matrix), z).reshape(n, d)
    values = torch.linalg.eigvalsh(x.T @ x / n)
    low, high = law.edges()
    positive = values[values > 1e-9]
    assert len(positive) == min(n, d)
    assert float(positive[-1]) == pytest.approx(high, rel=0.06)
    assert float(positive[0]) == pytest.approx(low, rel=0.15, abs=2e-3)
    share = torch.arange(1, d + 1, dtype=torch.float64) / d
    assert float((law.cdf(values.clamp_min(0)) - share)[d - len(positive) :].abs().max()) < 0.02
    assert float(values.square().mean()) == pytest.approx(1 + d / n * spread(times), rel=0.04)  # Burda et al. 2005


def test_equal_samples_count_once():
    times = toeplitz(20, lambda k: 1.0)
    assert spread(times) == pytest.approx(20)
    for n, d in ((2000, 50), (2000, 300)):
        law, once = CorrelatedSamples(d / n, *times), IndependentSamples(d / (n / 20))
        assert law.edges() == pytest.approx(once.edges(), rel=1e-6)
        x = torch.linspace(once.edges()[0], once.edges()[1], 20, dtype=torch.float64)
        torch.testing.assert_close(law.cdf(x), once.cdf(x), rtol=0, atol=2e-3)


def test_tracy_widom_edge_is_exceeded_as_often_as_it_says():
    n, d, runs = 1200, 60, 200
    edge = CorrelatedSamples(d / n, *toeplitz(12, lambda k: 0.7**k)).tracy_widom_edge(d, 0.1)
    above = 0
    for seed in range(runs):
        x = autoregressive(n // 12, 12, d, 0.7, seed).reshape(n, d)
        above += float(torch.linalg.eigvalsh(x.T @ x / n)[-1]) > edge
    assert 0.04 < above / runs < 0.17


def test_an_effective_size_knows_edges_alone():
    assert EffectiveSize(0.3).edges() == IndependentSamples(0.3).edges()
    assert not math.isclose(EffectiveSize(2.0).edges()[1], IndependentSamples(1.0).edges()[1])
