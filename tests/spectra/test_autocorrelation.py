from __future__ import annotations

import pytest
import torch

from optimum_rmtkd.spectra import SecondMoments
from optimum_rmtkd.spectra.autocorrelation import MAX_LAG, lagged_sums, projections, time_spectrum
from optimum_rmtkd.spectra.laws import spread

from .conftest import autoregressive, with_spikes


def size_ratio(phi, length):
    """n / n_eff of AR(phi) in sequences of `length`: 1 + 2 sum (1 - k/L) phi^(2k)."""
    return 1 + 2 * sum((1 - k / length) * phi ** (2 * k) for k in range(1, length))


def moments_of(x, mask=None, chunk=100):
    moments = SecondMoments(x.shape[-1])
    for i in range(0, len(x), chunk):
        moments.update(x[i : i + chunk], None if mask is None else mask[i : i + chunk])
    return moments


@pytest.mark.parametrize("length", [9, 50])
def test_lagged_sums_against_loops(length):
    x, pivot = autoregressive(3, length, 5, 0.5), torch.full((5,), 0.3, dtype=torch.float64)
    mask = torch.rand(3, length, generator=torch.Generator().manual_seed(0)) < 0.7
    y = x - pivot
    z = y @ projections(5)
    got = lagged_sums(x.masked_fill(~mask[..., None], float("nan")), mask, pivot)
    assert all(len(value) == min(length, MAX_LAG + 1) for value in got.values())
    for lag in (0, 1, 3, 8, min(length - 1, MAX_LAG)):
        pairs = [(b, t) for b in range(3) for t in range(length - lag) if mask[b, t] and mask[b, t + lag]]
        assert int(got["lag_pairs"][lag]) == len(pairs)
        products = sum(
            (torch.outer(y[b, t], z[b, t + lag]) + torch.outer(y[b, t + lag], z[b, t]) for b, t in pairs),
            torch.zeros(5, z.shape[-1], dtype=torch.float64),
        )
        totals = sum((y[b, t] + y[b, t + lag] for b, t in pairs), torch.zeros(5, dtype=torch.float64))
        torch.testing.assert_close(got["lag_products"][lag], products, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got["lag_totals"][lag], totals, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("phi", [0.5, 0.8, -0.7])
def test_n_effective_of_autoregressive_tokens(padding, phi):
    x = autoregressive(600, 64, 30, phi) + 7
    mask = torch.ones(600, 64, dtype=torch.bool)
    if padding:
        mask[::2, 40:] = False
    moments = moments_of(x, mask)
    assert moments.count / moments.n_effective == pytest.approx(size_ratio(phi, 64), rel=0.04)


@pytest.mark.parametrize("spikes", [(20.0, 200.0), (1e3, 1e4), (1e6, 2e6)])
@pytest.mark.parametrize("phi, of_spikes", [(0.9, 0.0), (0.3, 0.99)])
def test_spikes_do_not_hide_the_correlation_of_the_noise(spikes, phi, of_spikes):
    """12 directions that hold most of the variance, up to a million times the noise, and have another correlation."""
    x = with_spikes(autoregressive(512, 8, 200, phi), 12, spikes, of_spikes)
    moments = moments_of(x)
    assert moments.count / moments.n_effective == pytest.approx(size_ratio(phi, 8), rel=0.06)


def test_few_sequences_of_many_channels():
    """Channels beyond the samples' worth, where a bulk that lost its upper end looks hardly correlated."""
    for seed in range(3):
        moments = moments_of(with_spikes(autoregressive(64, 8, 384, 0.9, seed), 12, (20.0, 200.0), seed=seed))
        assert 0.8 * size_ratio(0.9, 8) < moments.count / moments.n_effective < 1.05 * size_ratio(0.9, 8)


def test_independent_tokens_lose_little_and_equal_tokens_count_once():
    independent = moments_of(autoregressive(600, 64, 30, 0.0))
    assert independent.n_effective > 0.98 * independent.count
    repeated = moments_of(autoregressive(500, 1, 30, 0.0).expand(500, 20, 30))
    assert repeated.n_effective == pytest.approx(500, rel=0.01)
    flat = SecondMoments(30)
    flat.update(autoregressive(1, 500, 30, 0.8)[0])
    assert flat.n_effective == 500


def test_sequences_of_every_length():
    """Lengths 1, 5 and 50 (beyond the last lag): the correlation of all samples has a block for each sequence."""
    x, lengths = autoregressive(300, 50, 20, 0.8), torch.tensor([1, 5, 50]).repeat(100)
    moments = moments_of(x, torch.arange(50)[None, :] < lengths[:, None])
    total = sum(length * size_ratio(0.8, length) for length in (1, 5, 50)) / 56
    assert moments.count / moments.n_effective == pytest.approx(total, rel=0.05)


def test_time_spectrum_of_known_correlations():
    rho = torch.tensor([0.5, 0.2], dtype=torch.float64)
    times, shares = time_spectrum(rho, torch.tensor([30.0, 20.0, 10.0]))  # ten sequences of three
    matrix = torch.tensor([[1, 0.5, 0.2], [0.5, 1, 0.5], [0.2, 0.5, 1]], dtype=torch.float64)
    assert times == pytest.approx(torch.linalg.eigvalsh(matrix).tolist()) and shares == pytest.approx([1 / 3] * 3)
    mixed = time_spectrum(rho[:1], torch.tensor([7.0, 2.0]))  # two pairs, three alone
    found = sorted(zip(*mixed))
    assert [t for t, _ in found] == pytest.approx([0.5, 1.0, 1.5])
    assert [share for _, share in found] == pytest.approx([2 / 7, 3 / 7, 2 / 7])
    impossible = time_spectrum(torch.tensor([0.9, 0.0], dtype=torch.float64), torch.tensor([30.0, 20.0, 10.0]))
    assert min(impossible[0]) == 0 and sum(t * s for t, s in zip(*impossible)) == pytest.approx(1)


def test_any_chunking_merging_and_resuming_gives_the_same_size():
    x = torch.cat((with_spikes(autoregressive(40, 12, 24, 0.8), 3, (9.0, 30.0)), torch.zeros(40, 6, 24)), 1) + 50
    mask = torch.arange(18)[None, :] < torch.arange(40)[:, None] % 10 + 3
    whole = SecondMoments(24)
    whole.update(x, mask)
    for chunk in (1, 7):
        assert moments_of(x, mask, chunk).n_effective == pytest.approx(whole.n_effective, rel=1e-9)
    short, long = moments_of(x[:20, :4], mask[:20, :4]), moments_of(x[20:], mask[20:])
    expected = moments_of(x[20:], mask[20:])
    expected.update(x[:20, :4], mask[:20, :4])
    assert short.merge(long).n_effective == pytest.approx(expected.n_effective, rel=1e-9)  # fewer lags met more
    resumed = SecondMoments(24)
    resumed.load_state_dict(moments_of(x[:20], mask[:20]).state_dict())
    resumed.update(x[20:], mask[20:])
    assert resumed.n_effective == pytest.approx(whole.n_effective, rel=1e-9)
    assert spread(((0.0, 2.0), (0.5, 0.5))) == 2
