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


def test_n_effective_repairs_the_median_rule_on_correlated_tokens(spiked):
    """AR(0.8) tokens, 4,000 sequences of 64: as in peers' simulations, the median rule over-keeps with n, not with
    n_eff."""
    noise = spiked(2000 * 64, dim=60, rank=3, spikes=(6.0, 9.0)).reshape(2000, 64, 60)
    for t in range(1, 64):
        noise[:, t] = 0.8 * noise[:, t - 1] + 0.6 * noise[:, t]
    moments = moments_of(noise[:40])
    assert moments.n_effective < moments.count / 6
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
