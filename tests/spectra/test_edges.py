from __future__ import annotations

import math

import pytest
import screenot
import torch
from screenot import ScreeNOT as reference

from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.spectra import (
    EDGE_ESTIMATORS,
    Edge,
    SecondMoments,
    Spectrum,
    estimate_edge,
    register_edge_estimator,
    spectrum_of,
)
from optimum_rmtkd.spectra import marchenko_pastur as mp
from optimum_rmtkd.spectra.edges import _screenot_threshold, _spike_strengths
from optimum_rmtkd.spectra.spectrum import NULL_SHARE

from .conftest import autoregressive, with_spikes


SEPARATING = ["mp_median", "gavish_donoho", "dpa", "signflip", "screenot"]
ROBUST = ["dpa", "signflip", "screenot"]


def spectrum(x, n_effective="none"):
    moments = SecondMoments(x.shape[-1], null_moments=True)
    moments.update(x)
    return spectrum_of(moments, n_effective)


def ranks(x):
    found = spectrum(x)
    return {name: estimate_edge(found, name).rank(found) for name in ["mp_quantile", *SEPARATING]}


@pytest.mark.parametrize("n", [800, 4000])
@pytest.mark.parametrize("seed", [0, 1])
def test_white_noise_and_15_spikes(spiked, n, seed):
    found = ranks(spiked(n, seed=seed))
    assert {name: found[name] for name in SEPARATING} == dict.fromkeys(SEPARATING, 15)


@pytest.mark.parametrize("n", [800, 4000])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_variance_per_channel_misleads_the_median_rules_only(spiked, n, seed):
    found = ranks(spiked(n, seed=seed, spread=0.5))
    for name in ROBUST:
        assert abs(found[name] - 15) <= 2, found
    # The flaw, on record: median rules keep noise, and more of it the more data they see.
    assert found["mp_median"] > (30 if n == 800 else 60)
    assert found["mp_quantile"] > 30


def test_fewer_samples_than_channels(spiked):
    found = ranks(spiked(200, dim=400, rank=6, spikes=(15.0, 40.0)))
    for name in SEPARATING:
        assert abs(found[name] - 6) <= 1, found


@pytest.mark.parametrize("tau", [0.2, 0.5, 0.6])
def test_the_papers_rule_is_a_quantile_rule_when_samples_abound(tau):
    """Power-law spectrum, q = 0.001: about 1 - tau of the directions are kept."""
    found = Spectrum(torch.arange(1, 769, dtype=torch.float64).pow(-1.0), n=768_000)
    edge = estimate_edge(found, "mp_quantile", tau=tau)
    assert edge.rank(found) / 768 == pytest.approx(1 - tau, abs=0.04)
    assert edge.value / edge.noise_variance == pytest.approx((1 + math.sqrt(0.001)) ** 2)


def test_the_refinement_finds_the_noise_level_of_white_noise(spiked):
    found = spectrum(spiked(800))
    assert abs(estimate_edge(found, "mp_quantile").noise_variance - 1) < 0.06
    assert estimate_edge(found, "mp_quantile", refine=False).noise_variance < 0.9


@pytest.mark.parametrize("q", [0.01, 0.1, 0.5, 0.9, 1.0, 1.2, 2.0, 2.3, 2.5, 3.0, 4.0, 6.0, 8.0, 10.0])
def test_the_refinement_finds_the_noise_level_at_every_aspect_ratio(q):
    d = 300 if q >= 0.1 else 60
    found = spectrum(torch.randn(round(d / q), d, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    for tau in (0.05, 0.2, 0.5, 0.7, 0.9):
        assert estimate_edge(found, "mp_quantile", tau=tau).noise_variance == pytest.approx(1, abs=0.12), tau


@pytest.mark.parametrize("n", [60, 100, 150])
def test_the_papers_rule_keeps_spikes_where_channels_outnumber_samples(spiked, n):
    found = spectrum(spiked(n, rank=15, spikes=(60.0, 200.0)))
    assert estimate_edge(found, "mp_quantile").rank(found) == 15


def test_noise_variance_and_edge_of_white_noise(spiked):
    found = spectrum(spiked(1600) * 3)
    for name in SEPARATING:
        edge = estimate_edge(found, name)
        assert edge.noise_variance == pytest.approx(9, rel=0.04), name
    for name in ("mp_median", "dpa"):
        assert estimate_edge(found, name).value == pytest.approx(mp.edges(0.25, 9.0)[1], rel=0.03)
        corrected = estimate_edge(found, name, tracy_widom_alpha=0.05).value
        exact = mp.tracy_widom_edge(1600, 400, 9.0, 0.05)
        assert corrected == pytest.approx(exact, rel=0.03) and corrected > estimate_edge(found, name).value


def test_generalised_edge_is_marchenko_pasturs_for_equal_variances():
    for q in (0.2, 1.0, 3.0):
        n = 300 / q
        flat = Spectrum(
            torch.full((300,), 2.0, dtype=torch.float64), n=n, diagonal=torch.full((300,), 2.0, dtype=torch.float64)
        )
        edge = estimate_edge(flat, "dpa", deflate=False)
        assert edge.value == pytest.approx(mp.edges(q, 2.0)[1], rel=1e-9)
        corrected = estimate_edge(flat, "dpa", deflate=False, tracy_widom_alpha=0.01).value
        assert corrected == pytest.approx(mp.tracy_widom_edge(n, 300, 2.0, 0.01), rel=1e-6)


def test_deflation_uncovers_shadowed_spikes(spiked):
    """One strong direction over 20 channels makes these look noisy and hides the four weak ones."""
    direction = (torch.arange(200) < 20).double() / 20**0.5
    strong = 15 * torch.randn(800, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = spectrum(spiked(800, dim=200, rank=4, spikes=(4.0, 7.0)) + strong * direction)
    assert estimate_edge(found, "dpa", deflate=False).rank(found) == 1
    assert estimate_edge(found, "dpa").rank(found) == 5


def correlated_noise(kind, n, dim=400):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    if kind == "tokens":
        return autoregressive(n // 40, 40, dim, 0.8)
    if kind == "channels":
        return autoregressive(n, dim, 1, 0.6).transpose(1, 2)
    if kind == "heavy tails":
        return (noise / torch.randn(n, 3, generator=generator, dtype=torch.float64).norm(dim=1)[:, None])[:, None]
    return noise[:, None]


@pytest.mark.parametrize("kind", ["tokens", "channels", "heavy tails"])
@pytest.mark.parametrize("n", [800, 4000])
def test_deflation_that_runs_away_is_given_up_and_named(kind, n):
    found = spectrum(with_spikes(correlated_noise(kind, n), 15, (6.0, 30.0)))
    edge = estimate_edge(found, "dpa")
    assert edge.rank(found) == edge.details["rank_undeflated"] <= 45
    assert "runs away" in edge.details["warning"] and "screenot" in edge.details["warning"]


@pytest.mark.parametrize("rank, spikes", [(15, (6.0, 30.0)), (60, (6.0, 30.0)), (100, (6.0, 600.0))])
def test_deflation_that_finds_its_end_is_kept(spiked, rank, spikes):
    found = spectrum(spiked(4000, rank=rank, spikes=spikes))
    edge = estimate_edge(found, "dpa")
    assert edge.rank(found) == rank and "warning" not in edge.details


@pytest.mark.parametrize("n", [100, 150, 300, 1000])
def test_spike_strengths_with_fewer_and_more_samples_than_channels(n):
    """Mean of 12 draws against the closed form of a spike in white noise."""
    strengths, truth = [], []
    for seed in range(12):
        noise = torch.randn(n, 1, 400, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = with_spikes(noise, 4, (40.0, 80.0), seed=seed)
        found = spectrum(x)
        strengths.append(_spike_strengths(found, 4))
        truth.append(mp.sample_to_spike(found.positive[:4], 400 / n) - 1)
    torch.testing.assert_close(torch.stack(strengths).mean(0), torch.stack(truth).mean(0), rtol=0.03, atol=0)


def test_one_massive_channel_shadows_everything_for_dpa_but_not_for_screenot(spiked):
    """On record: variance confined to one channel is noise by dpa's own definition, and there is nothing to
    deflate."""
    x = spiked(800, dim=200, rank=4, spikes=(4.0, 7.0))
    x[:, 0] *= 100
    found = spectrum(x)
    assert estimate_edge(found, "dpa").rank(found) == 0
    assert estimate_edge(found, "screenot").rank(found) == 5


@pytest.mark.parametrize("n, bound", [(400, 12), (400, 50), (1000, 25)])
@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_screenot_agrees_with_the_published_package(spiked, n, bound, spread):
    x = spiked(n, dim=200, spread=spread)
    x = (x - x.mean(0)) / n**0.5
    found = Spectrum(torch.linalg.svdvals(x).square(), n=n)
    _, threshold, rank = screenot.adaptiveHardThresholding(x.numpy(), bound)
    edge = estimate_edge(found, "screenot", rank_bound=bound)
    # the package bisects to 1e-5 in units of the singular values
    assert math.sqrt(edge.value) == pytest.approx(threshold, abs=2e-5)
    assert edge.rank(found) == rank


def test_screenot_of_a_wide_matrix_agrees_with_the_published_package(spiked):
    x = spiked(250) / 250**0.5
    values = torch.linalg.svdvals(x).square()
    # x is not centred: all 250 singular values are above zero, hence count = n + 1
    found = Spectrum(torch.cat([values, torch.zeros(150, dtype=torch.float64)]), n=250, count=251)
    _, threshold, rank = screenot.adaptiveHardThresholding(x.numpy(), 40)
    edge = estimate_edge(found, "screenot", rank_bound=40)
    assert math.sqrt(edge.value) == pytest.approx(threshold, abs=2e-5) and edge.rank(found) == rank


def test_screenot_threshold_solves_its_equation():
    noise = torch.linspace(0.2, 1.4, 50, dtype=torch.float64)
    assert reference.F(_screenot_threshold(noise, 0.3), noise.numpy(), 0.3) == pytest.approx(-4, abs=1e-9)


@pytest.mark.parametrize("rank", [15, 40, 80])
def test_screenots_sweep_outgrows_bounds_that_are_too_small(spiked, rank):
    """Rank 40 of 400: the bound d/16 = 25 answers 0, the others 40; rank 80: only d/4 holds, and the user is told."""
    found = spectrum(spiked(1600, rank=rank))
    edge = estimate_edge(found, "screenot")
    assert edge.rank(found) == rank and edge.details["rank_bounds"] == [25, 50, 100]
    assert ("warning" in edge.details) == (rank == 80)


@pytest.mark.parametrize("n", [800, 4000])
def test_screenot_says_so_when_there_is_no_bulk(n):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 400, generator=generator, dtype=torch.float64) * torch.arange(1, 401, dtype=torch.float64).pow(
        -0.5
    )
    edge = estimate_edge(spectrum(x), "screenot")
    assert "budget, not a finding" in edge.details["warning"] and edge.details["spread"] > 0.2


def test_null_directions_do_not_enter_medians(spiked):
    """LayerNorm leaves one exact null direction; a dead block leaves many."""
    x = spiked(2000, dim=200, rank=8)
    moments = {name: SecondMoments(400 if name == "padded" else 200) for name in ("fp64", "fp32", "padded")}
    centred = x - x.mean(1, keepdim=True)
    moments["fp64"].update(centred)
    moments["fp32"].update(centred.float())
    moments["padded"].update(torch.cat([x, torch.zeros_like(x)], 1))
    for name, nulls in (("fp64", 1), ("fp32", 1), ("padded", 200)):
        found = spectrum_of(moments[name])
        assert (
            found.null_count == nulls
            and found.width == 200 - (name != "padded")
            and len(found.positive) == found.width
        )
        for estimator in ("mp_median", "gavish_donoho", "dpa", "screenot"):
            assert estimate_edge(found, estimator).rank(found) == 8, (name, estimator)
    few = spectrum(spiked(50, dim=200))
    assert few.null_count == 200 - 49 and few.width == 200 and few.q == 4
    with pytest.raises(RMTKDError, match="constant"):
        Spectrum(torch.zeros(5, dtype=torch.float64), n=10).positive  # noqa: B018
    assert 0 < NULL_SHARE < 1e-3


def test_energy_and_fixed():
    found = Spectrum(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64), n=100)
    for share, rank in ((0.3, 1), (0.4, 1), (0.41, 2), (0.9, 3), (1.0, 4)):
        assert estimate_edge(found, "energy", share=share).rank(found) == rank
    for rank in (1, 4):
        assert estimate_edge(found, "fixed", rank=rank).rank(found) == rank
    assert math.isnan(estimate_edge(found, "fixed", rank=2).noise_variance)


def test_registry():
    @register_edge_estimator("kaiser")
    def kaiser(spectrum, factor: float = 1.0):
        mean = float(spectrum.positive.mean())
        return Edge(factor * mean, mean)

    try:
        found = Spectrum(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64), n=100)
        assert estimate_edge(found, "kaiser").rank(found) == 2
        assert estimate_edge(found, "kaiser", factor=1.3).rank(found) == 1
        with pytest.raises(RMTKDError, match="already registered"):
            register_edge_estimator("kaiser")(kaiser)
    finally:
        del EDGE_ESTIMATORS["kaiser"]


def test_errors_name_what_to_do():
    found = Spectrum(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64), n=100)
    for match, call in (
        ("Known: dpa, energy", lambda: estimate_edge(found, "scree")),
        ("option.* sigma .*It takes: tau", lambda: estimate_edge(found, "mp_quantile", sigma=1)),
        ("null_moments=True", lambda: estimate_edge(found, "signflip")),
        ("diagonal", lambda: estimate_edge(found, "dpa")),
        ("rank_bound", lambda: estimate_edge(found, "screenot", rank_bound=3)),
        ("tau=1.5", lambda: estimate_edge(found, "mp_quantile", tau=1.5)),
        ("share=0", lambda: estimate_edge(found, "energy", share=0)),
        ("rank=9", lambda: estimate_edge(found, "fixed", rank=9)),
    ):
        with pytest.raises(RMTKDError, match=match):
            call()
