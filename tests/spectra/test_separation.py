"""When an edge says how many directions are signal."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from optimum_rmtkd.spectra import SecondMoments, signal_subspace
from optimum_rmtkd.spectra.separation import doubt


def subspace(x, **options):
    moments = SecondMoments(x.shape[-1], null_moments=True)
    moments.update(x)
    return signal_subspace(moments, **options)


def noise(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "n, dim, rank", [(800, 400, 15), (4000, 400, 15), (4000, 64, 6), (4000, 32, 4), (20000, 128, 8)]
)
def test_spikes_in_white_noise_are_beyond_doubt(spiked, n, dim, rank):
    found = subspace(spiked(n, dim=dim, rank=rank))
    assert doubt(found) is None, found.ranks
    assert found.spectral_rank == rank


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_a_spectrum_without_a_gap_is_doubtful(power):
    falling = noise(4000, 128) * torch.arange(1, 129, dtype=torch.float64) ** (-power / 2)
    assert doubt(subspace(falling)) is not None


def test_noise_alone_has_no_signal_to_keep():
    """All of it carries what the network computes, or nothing does: the spectrum cannot tell."""
    assert "nothing lies above" in doubt(subspace(noise(4000, 64)))


def test_rules_that_differ_are_named_with_their_ranks(spiked):
    found = subspace(spiked(4000, spread=0.5))
    text = doubt(found)
    assert "by mp_median" in text or "by mp_quantile" in text
    assert f"of {found.dim}" in text


def test_agreement_alone_is_not_enough(spiked):
    """Rules can agree by chance on a spectrum that is no noise below its edge."""
    found = subspace(spiked(2000, dim=64, rank=6))
    assert doubt(found) is None
    assert "Kolmogorov-Smirnov 0.20" in doubt(dataclasses.replace(found, ks_distance=0.2))
    assert "fewer than two" in doubt(dataclasses.replace(found, ks_distance=float("nan")))


def test_controls_neither_vote_nor_are_believed(spiked):
    x = spiked(2000, dim=64, rank=6)
    assert "energy" in subspace(x).ranks
    assert "no model of noise" in doubt(subspace(x, estimator="energy"))
