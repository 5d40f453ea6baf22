from __future__ import annotations

import pytest
import torch

from optimum_rmtkd.spectra import SecondMoments
from optimum_rmtkd.spectra.autocorrelation import MAX_LAG, lagged_sums, projections


def autoregressive(batch, length, dim, phi, seed=0):
    noise = torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = noise.clone()
    for t in range(1, length):
        x[:, t] = phi * x[:, t - 1] + (1 - phi**2) ** 0.5 * noise[:, t]
    return x


def test_lagged_sums_against_loops():
    x, pivot = autoregressive(3, 9, 5, 0.5), torch.full((5,), 0.3, dtype=torch.float64)
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.7
    z = (x - pivot) @ projections(5)
    got = lagged_sums(x, mask, pivot)
    for lag in (0, 1, 3, 8, 9, MAX_LAG):
        pairs = [(b, t) for b in range(3) for t in range(9 - lag) if mask[b, t] and mask[b, t + lag]]
        assert int(got["lag_pairs"][lag]) == len(pairs)
        products = sum((z[b, t] * z[b, t + lag] for b, t in pairs), torch.zeros(8))
        totals = sum((z[b, t] + z[b, t + lag] for b, t in pairs), torch.zeros(8))
        torch.testing.assert_close(got["lag_products"][lag], products.double(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got["lag_totals"][lag], totals.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", [False, True])
def test_n_effective_of_autoregressive_tokens(padding):
    """AR(0.8): 1 + 2 sum (1 - k/L) 0.8^k, about n / 8.5 at L = 64 (n / 9 for endless sequences)."""
    x = autoregressive(600, 64, 30, 0.8) + 7
    mask = torch.ones(600, 64, dtype=torch.bool)
    if padding:
        mask[::2, 40:] = False
    moments = SecondMoments(30)
    for chunk, kept in zip(x.split(100), mask.split(100)):
        moments.update(chunk, kept)
    expected = moments.count / 8.5
    assert abs(moments.n_effective / expected - 1) < 0.1


def test_independent_tokens_lose_little_and_equal_tokens_count_once():
    independent = SecondMoments(30)
    independent.update(autoregressive(600, 64, 30, 0.0))
    assert independent.n_effective > 0.97 * independent.count
    repeated = SecondMoments(30)
    repeated.update(autoregressive(500, 1, 30, 0.0).expand(500, 20, 30))
    assert repeated.n_effective == pytest.approx(500, rel=0.01)
    flat = SecondMoments(30)
    flat.update(autoregressive(1, 500, 30, 0.8)[0])
    assert flat.n_effective == 500
