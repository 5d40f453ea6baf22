from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimum_rmtkd.errors import CalibrationError, RMTKDError
from optimum_rmtkd.spectra import EDGE_ESTIMATORS, SecondMoments, signal_subspace
from optimum_rmtkd.spectra import marchenko_pastur as mp

from .conftest import autoregressive, with_spikes


def moments_of(x, null_moments=False):
    moments = SecondMoments(x.shape[-1], null_moments=null_moments)
    moments.update(x)
    return moments


def test_white_noise_and_15_spikes(spiked):
    x = spiked(1600)
    found = signal_subspace(moments_of(x, null_moments=True))
    assert (found.rank, found.spectral_rank, found.dim, found.n, found.n_eff, found.q) == (
        15,
        15,
        400,
        1600,
        1600,
        0.25,
    )
    assert found.basis.shape == (400, 15) and found.basis.dtype == torch.float64
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(15, dtype=torch.float64))
    assert bool((found.basis.gather(0, found.basis.abs().argmax(0, keepdim=True)) > 0).all())
    assert bool((found.eigenvalues.diff() <= 0).all())
    covariance = torch.cov(x.T, correction=0)
    torch.testing.assert_close(
        found.basis.T @ covariance @ found.basis, found.eigenvalues[:15].diag(), rtol=1e-9, atol=1e-9
    )
    assert found.ks_distance < 0.03 and found.split_half_overlap > 0.8 and 0.7 < found.last_overlap < 1
    assert found.warnings == () and found.null_directions == 0
    assert set(found.ranks) | set(found.skipped) | {"screenot"} == set(EDGE_ESTIMATORS)
    assert all(found.ranks[name] == 15 for name in ("mp_median", "gavish_donoho", "dpa", "signflip"))
    assert found.variance_kept == pytest.approx(float(found.eigenvalues[:15].sum() / found.eigenvalues.sum()))


def test_what_does_not_apply_is_skipped_with_a_reason(spiked):
    found = signal_subspace(moments_of(spiked(800)))
    assert "null_moments=True" in found.skipped["signflip"] and "user" in found.skipped["fixed"]
    plain = signal_subspace(moments_of(spiked(800)), compare=False)
    assert plain.ranks == {} and math.isnan(plain.split_half_overlap)


def test_to_dict_is_json_without_the_basis(spiked):
    found = signal_subspace(moments_of(spiked(800)), estimator="energy", share=0.5, split_half=False)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert "basis" not in values and values["rank"] == found.rank and len(values["eigenvalues"]) == 400
    assert values["noise_variance"] is None and values["details"]["share"] == 0.5


def test_minimum_and_rounding(spiked):
    moments = moments_of(spiked(800))

    def rank(**options):
        return signal_subspace(moments, compare=False, **options).rank

    assert rank() == 15 and rank(round_to=8) == 16 and rank(min_rank=20) == 20 and rank(min_rank=20, round_to=16) == 32
    assert rank(min_rank=399, round_to=64) == 400
    assert signal_subspace(moments, compare=False, round_to=8).spectral_rank == 15
    noise = moments_of(torch.randn(800, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert signal_subspace(noise, compare=False).spectral_rank == 0
    assert signal_subspace(noise, compare=False).basis.shape == (50, 1)


def test_warnings(spiked):
    abundant = signal_subspace(moments_of(spiked(6000, dim=50, rank=3, spread=0.5)), compare=False)
    text = " | ".join(abundant.warnings)
    assert "quantile rule" in text and "within 19 % of sigma^2" in text and "bulk is not Marchenko-Pastur" in text
    half = signal_subspace(moments_of(spiked(800)), estimator="energy", share=0.99, compare=False)
    assert any("more than half is signal" in warning for warning in half.warnings)
    power = torch.randn(800, 400, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 401).pow(-0.5)
    assert any(
        "budget, not a finding" in warning for warning in signal_subspace(moments_of(power), compare=False).warnings
    )
    corrected = signal_subspace(moments_of(spiked(800)), tracy_widom_alpha=0.05, compare=False)
    assert corrected.warnings == ("tracy_widom_alpha has no effect on screenot",)


def test_tracy_widom_and_effective_sample_size_move_the_edge(spiked):
    moments = moments_of(spiked(800))

    def edge(**options):
        return signal_subspace(moments, estimator="mp_median", compare=False, **options).edge

    assert edge(tracy_widom_alpha=0.01) > edge(tracy_widom_alpha=0.05) > edge()
    assert edge(n_effective=400) > edge()
    assert signal_subspace(moments, n_effective=400, compare=False).q == 1


ESTIMATORS = ["mp_median", "gavish_donoho", "mp_quantile"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("samples, dim", [(4000, 400), (300, 400)])
def test_a_given_size_moves_the_edge_and_not_the_noise_level(estimator, samples, dim):
    generator = torch.Generator().manual_seed(0)
    moments = moments_of(torch.randn(samples, dim, generator=generator, dtype=torch.float64))
    edges = []
    for n in (3000, 2000, 401, 400, 399, 200, 50):
        found = signal_subspace(moments, estimator=estimator, n_effective=n, compare=False)
        if n <= samples:
            assert found.noise_variance == pytest.approx(1, abs=0.03) and found.spectral_rank == 0, n
            assert found.edge > mp.edges(dim / n)[1] * 0.97
            edges.append(found.edge)
    assert edges == sorted(edges) and len(set(edges)) == len(edges)


def test_a_size_that_contradicts_the_spectrum_shows_in_the_distance():
    generator = torch.Generator().manual_seed(0)
    moments = moments_of(torch.randn(4000, 400, generator=generator, dtype=torch.float64))
    fits = [signal_subspace(moments, n_effective=n, compare=False).ks_distance for n in (4000, 200, 50)]
    assert fits[0] < 0.02 and fits[1] > 0.4 and fits[2] > 0.8  # half and seven eighths of the law would be zeros


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("sequences, dim", [(100, 100), (500, 200), (500, 50)])
def test_noise_of_correlated_tokens_alone(estimator, sequences, dim):
    moments = moments_of(autoregressive(sequences, 40, dim, 0.8))
    found = signal_subspace(moments, estimator=estimator, n_effective="auto", compare=False)
    assert found.noise_variance == pytest.approx(1, abs=0.01) and found.ks_distance < 0.05
    # The edge is where the largest eigenvalue tends to; it fluctuates on both sides, seldom above.
    assert float(found.eigenvalues[0]) < 1.03 * found.edge and found.spectral_rank <= 1
    if estimator != "gavish_donoho":
        assert found.edge < 1.05 * float(found.eigenvalues[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("sequences", [64, 256, 512])
def test_spikes_in_correlated_tokens(estimator, sequences):
    """AR(0.9) noise, eight tokens a sequence, 384 channels, 12 spikes white in time: from fewer to more effective
    samples than channels."""
    for seed in range(2):
        x = with_spikes(autoregressive(sequences, 8, 384, 0.9, seed), 12, (20.0, 200.0), seed=seed)
        found = signal_subspace(moments_of(x), estimator=estimator, n_effective="auto", compare=False)
        assert 12 <= found.spectral_rank <= 15 and found.noise_variance == pytest.approx(1, abs=0.06)
        assert found.ks_distance < 0.1


@pytest.mark.parametrize(
    "sequences, length, dim, rank, spikes", [(20, 40, 400, 15, (20.0, 60.0)), (100, 8, 1536, 12, (30.0, 200.0))]
)
def test_fewer_samples_worth_than_channels(sequences, length, dim, rank, spikes):
    x = with_spikes(autoregressive(sequences, length, dim, 0.8), rank, spikes)
    found = signal_subspace(moments_of(x), estimator="mp_median", n_effective="auto", compare=False)
    assert found.n_eff < dim and rank <= found.spectral_rank <= rank + 3
    assert found.noise_variance == pytest.approx(1, abs=0.06)


def test_screenot_looks_at_the_matrix_itself():
    moments = moments_of(with_spikes(autoregressive(100, 40, 400, 0.8), 15, (6.0, 30.0)))
    edges = {n: signal_subspace(moments, n_effective=n, compare=False).edge for n in ("none", "auto", 500)}
    assert len(set(edges.values())) == 1


def test_unequal_weights_count_as_an_effective_size():
    generator = torch.Generator().manual_seed(0)
    moments = SecondMoments(200)
    x = torch.randn(3000, 200, generator=generator, dtype=torch.float64)
    weight = torch.rand(3000, generator=generator, dtype=torch.float64).pow(20)
    moments.update(x, weight=weight)
    found = signal_subspace(moments, estimator="mp_median", compare=False)
    assert found.n_eff < 400 and found.noise_variance == pytest.approx(1, abs=0.1)
    equal = SecondMoments(200)
    equal.update(x, weight=torch.full((3000,), 0.3))
    assert signal_subspace(equal, compare=False).times is None
    assert signal_subspace(equal, compare=False, estimator="mp_median").edge == pytest.approx(
        signal_subspace(moments_of(x), compare=False, estimator="mp_median").edge
    )


def test_n_effective_repairs_the_median_rule_on_correlated_tokens(spiked):
    """AR(0.8) tokens, 4,000 sequences of 64: as in peers' simulations, the median rule over-keeps with n, not with
    n_eff."""
    noise = spiked(2000 * 64, dim=60, rank=3, spikes=(6.0, 9.0)).reshape(2000, 64, 60)
    for t in range(1, 64):
        noise[:, t] = 0.8 * noise[:, t - 1] + 0.6 * noise[:, t]
    moments = moments_of(noise[:40])
    assert moments.count / 4.7 < moments.n_effective < moments.count / 3.7
    naive = signal_subspace(moments, estimator="mp_median", compare=False).rank
    repaired = signal_subspace(moments, estimator="mp_median", n_effective="auto", compare=False).rank
    assert naive > 10 and repaired <= 5


def test_determinism(spiked):
    x = spiked(800)
    first, second = (signal_subspace(moments_of(x, null_moments=True)) for _ in range(2))
    assert torch.equal(first.basis, second.basis) and first.to_dict() == second.to_dict()


def test_tiny_sites():
    generator = torch.Generator().manual_seed(0)
    for dim in (4, 8, 16):
        found = signal_subspace(moments_of(torch.randn(500, dim, generator=generator)))
        assert 1 <= found.rank <= dim
    with pytest.raises(RMTKDError, match="another estimator"):
        signal_subspace(moments_of(torch.randn(500, 2, generator=generator)))
    assert signal_subspace(moments_of(torch.randn(500, 2, generator=generator)), estimator="mp_median").rank in (1, 2)


def test_bad_input(spiked):
    moments = moments_of(spiked(50, dim=20, rank=2))
    for error, match, call in (
        (RMTKDError, "Known: dpa", lambda: signal_subspace(moments, estimator="scree")),
        (RMTKDError, "option.*tau.*rank_bound", lambda: signal_subspace(moments, tau=0.5)),
        (RMTKDError, "n_effective='some'", lambda: signal_subspace(moments, n_effective="some")),
        (RMTKDError, "n_effective=1", lambda: signal_subspace(moments, n_effective=1)),
        (RMTKDError, "min_rank=0", lambda: signal_subspace(moments, min_rank=0)),
        (RMTKDError, "null_moments=True", lambda: signal_subspace(moments, estimator="signflip")),
        (CalibrationError, "No samples", lambda: signal_subspace(SecondMoments(4))),
        (CalibrationError, "at least 2", lambda: signal_subspace(moments_of(torch.ones(1, 4)))),
        (CalibrationError, "all equal", lambda: signal_subspace(moments_of(torch.ones(9, 4)))),
    ):
        with pytest.raises(error, match=match):
            call()
    moments._sums["outer"][0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        signal_subspace(moments)


def test_the_package_imports_torch_alone():
    root = Path(__file__).parents[2]
    names = "('scipy', 'transformers', 'accelerate', 'screenot')"
    code = (
        "import torch, sys; before = set(sys.modules); import optimum_rmtkd.spectra; "
        f"print([m for m in {names} if m in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
