from __future__ import annotations

import pytest
import torch

from optimum_rmtkd.distillation import (
    AutoencoderProjection,
    DistillationStep,
    MarchenkoPasturProjection,
    PCAProjection,
    ProjectedFeatureLoss,
    RandomProjection,
)
from optimum_rmtkd.distillation.layers import layer_pairs, uniform_map
from optimum_rmtkd.distillation.subspaces import build_projection
from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.spectra import SecondMoments

from ..trainer.conftest import tiny_bert


def spiked(features=96, samples=2048, spikes=8, rho=0.0, sequence=32, seed=0):
    """(sequences, tokens, features): unit noise and `spikes` orthonormal directions of variance 25."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(features, spikes, generator=generator))[0]
    noise = torch.randn(samples // sequence, sequence, features + spikes, generator=generator)
    for token in range(1, sequence):
        noise[:, token] = rho * noise[:, token - 1] + (1 - rho**2) ** 0.5 * noise[:, token]
    return noise[..., :features] + 5 * noise[..., features:] @ basis.T, basis


def moments_of(data):
    moments = SecondMoments(data.shape[-1])
    moments.update(data)
    return moments


def overlap(a, b):
    return float((a.double().T @ b.double()).square().sum() / min(a.shape[1], b.shape[1]))


def orthonormal_columns(basis):
    return torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=basis.dtype), atol=1e-10)


def test_random_is_orthonormal_seeded_and_half_as_wide():
    moments = moments_of(torch.randn(4, 10, 12))
    first, again = (RandomProjection(seed=3).fit(moments) for _ in range(2))
    assert first.shape == (12, 6) and orthonormal_columns(first) and torch.equal(first, again)
    assert not torch.allclose(first, RandomProjection(seed=4).fit(moments))
    # E ||v K||^2 = (d / p) ||v||^2 over the draws
    vector = torch.randn(12, dtype=torch.float64)
    kept = [(vector @ RandomProjection(seed=s).fit(moments)).square().sum() for s in range(600)]
    assert float(sum(kept) / 600 / vector.square().sum()) == pytest.approx(0.5, abs=0.03)


def test_pca_is_the_eigendecomposition():
    data, _ = spiked()
    values, vectors = torch.linalg.eigh(torch.cov(data.reshape(-1, 96).double().T))
    basis = PCAProjection(dim=8).fit(moments_of(data))
    assert overlap(basis, vectors[:, -8:]) == pytest.approx(1.0, abs=1e-6) and orthonormal_columns(basis)
    wanted = int((values.flip(0).cumsum(0) / values.sum() < 0.9).sum()) + 1
    assert PCAProjection(energy=0.9).fit(moments_of(data)).shape[1] == wanted


def test_linear_autoencoder_finds_the_principal_subspace():
    data, basis = spiked(spikes=6)
    rows = data.reshape(-1, 96)
    found = AutoencoderProjection(dim=6, hidden=0, steps=800, learning_rate=1e-2).fit(moments_of(data), rows)
    assert orthonormal_columns(found) and overlap(found, basis) > 0.95
    assert overlap(found, PCAProjection(dim=6).fit(moments_of(data))) > 0.99
    state = torch.random.get_rng_state()
    AutoencoderProjection(dim=2, steps=2).fit(moments_of(data), rows)
    assert torch.equal(state, torch.random.get_rng_state())


def test_marchenko_pastur_recovers_all_spikes():
    data, basis = spiked(features=384, samples=4096, spikes=24)
    found = MarchenkoPasturProjection().fit(moments_of(data))
    assert found.shape == (384, 24) and overlap(found, basis) > 0.95


def test_marchenko_pastur_warns_of_correlated_tokens(caplog):
    MarchenkoPasturProjection().fit(moments_of(spiked()[0]))
    assert "correlated" not in caplog.text
    MarchenkoPasturProjection(n_effective="none").fit(moments_of(spiked(rho=0.9)[0]))
    assert "they are correlated" in caplog.text


def test_wiener_weights_shrink_the_columns():
    data, _ = spiked()
    moments = moments_of(data)
    hard, soft = (MarchenkoPasturProjection(wiener=w).fit(moments) for w in (False, True))
    norms = soft.norm(dim=0)
    assert torch.allclose(soft / norms, hard) and (norms < 1).all() and norms.min() > 0.8
    with pytest.raises(RMTKDError, match="expected True or False; got a str. Write False, without quotes"):
        MarchenkoPasturProjection(wiener="no")
    with pytest.raises(RMTKDError, match="'fixed' needs the option.* rank"):
        MarchenkoPasturProjection("fixed").fit(moments)
    assert MarchenkoPasturProjection("fixed", options={"rank": 3}).fit(moments).shape[1] == 3
    with pytest.raises(RMTKDError, match="no noise variance"):
        MarchenkoPasturProjection("energy", wiener=True).fit(moments)


def test_registry_and_refusals():
    built = build_projection({"name": "marchenko_pastur", "estimator": "screenot"})
    assert build_projection(built.to_dict()).to_dict() == built.to_dict()
    with pytest.raises(
        RMTKDError, match="No projection 'svd'; expected one of autoencoder, marchenko_pastur, pca, random"
    ):
        ProjectedFeatureLoss("svd")
    for bad in (
        {"name": "random", "dim": 2.0},
        {"name": "pca", "dim": 0},
        {"name": "marchenko_pastur", "estimator": "median"},
    ):
        with pytest.raises(RMTKDError, match="expected"):
            build_projection(bad)
    with pytest.raises(RMTKDError, match="layers='first'"):
        ProjectedFeatureLoss(layers="first")
    with pytest.raises(RMTKDError, match="dim=99"):
        RandomProjection(99).fit(moments_of(torch.randn(2, 3, 4)))


# -- layers -----------------------------------------------------------------------------------------------------------


def test_layer_maps():
    assert uniform_map(6, 12) == [1, 3, 5, 7, 9, 11] and uniform_map(4, 4) == [0, 1, 2, 3]
    assert uniform_map(1, 12) == [11] and uniform_map(3, 2) == [0, 0, 1]
    small, large = tiny_bert(num_hidden_layers=1), tiny_bert()
    assert layer_pairs(small, large, "uniform") == (("bert.encoder.layer.0", "bert.encoder.layer.1"),)
    assert layer_pairs(small, large, {"0": -2, "bert.pooler": "bert.pooler"}) == (
        ("bert.encoder.layer.0", "bert.encoder.layer.0"),
        ("bert.pooler", "bert.pooler"),
    )
    with pytest.raises(RMTKDError, match="no module 'bert.x' in Bert"):
        layer_pairs(small, large, {"bert.x": 0})
    with pytest.raises(RMTKDError, match="block 5 of Bert.*, which has 2"):
        layer_pairs(small, large, {0: 5})
    with pytest.raises(RMTKDError, match="'first'"):
        layer_pairs(small, large, "first")


# -- the loss ---------------------------------------------------------------------------------------------------------


def fitted(projection, teacher_features, student=None, teacher=None, projections=None, **arguments):
    student, teacher = student or tiny_bert(), teacher or tiny_bert(seed=1)
    loss = ProjectedFeatureLoss(projection, tokens_per_sequence=10**6, **arguments)
    loss.setup(student, teacher, projections or {})
    mask = torch.ones(teacher_features.shape[:2], dtype=torch.bool)
    path = loss.features().teacher[0]
    loss.observe(DistillationStep({}, teacher_features={path: teacher_features}, mask=mask))
    loss.finish()
    return loss


def ask(loss, ours, theirs, mask=None):
    request = loss.features()
    step = DistillationStep(
        {}, student_features={request.student[0]: ours}, teacher_features={request.teacher[0]: theirs}, mask=mask
    )
    loss.prepare(step)
    return loss(step)


@pytest.mark.parametrize("projection", [None, "random", "pca", "autoencoder", "marchenko_pastur"])
def test_the_scale_is_the_same_for_every_projection(projection):
    """A student that knows only the mean has loss 1, whatever the subspace."""
    theirs, _ = spiked(features=32, samples=1024, spikes=3)
    loss = fitted(projection, theirs)
    mean = theirs.reshape(-1, 32).mean(0).expand_as(theirs)
    assert ask(loss, mean, theirs).item() == pytest.approx(1.0, rel=2e-3)
    assert ask(loss, theirs, theirs) == 0


def test_signal_errors_weigh_more_than_noise_errors_in_the_marchenko_pastur_subspace():
    theirs, basis = spiked(features=32, samples=4096, spikes=3)
    loss = fitted("marchenko_pastur", theirs)
    inside = torch.randn(*theirs.shape[:2], 3) @ basis.T
    outside = torch.randn(theirs.shape)
    outside = outside - outside @ basis @ basis.T
    outside = outside * inside.norm() / outside.norm()
    assert ask(loss, theirs + inside, theirs) > 10 * ask(loss, theirs + outside, theirs)


def test_of_a_reduced_student_it_is_the_plain_error_against_the_projected_teacher():
    theirs = torch.randn(8, 16, 32)
    cut = torch.linalg.qr(torch.randn(32, 12))[0]
    student = tiny_bert(hidden_size=12)
    ours = torch.randn(8, 16, 12)
    full = (RandomProjection(dim=12), MarchenkoPasturProjection(dim=12))  # a rotation: the same error
    for projection in (None, *full):
        loss = fitted(projection, theirs, student=student, projections={"hidden": cut})
        target = theirs @ cut
        variance = target.reshape(-1, 12).var(0, unbiased=False).mean()
        expected = (ours - target).square().mean() / variance
        assert ask(loss, ours, theirs).item() == pytest.approx(expected.item(), rel=2e-3)
        assert not list(loss.parameters())


def test_masked_positions_do_not_enter():
    theirs, ours = torch.randn(4, 6, 32), torch.randn(4, 6, 32)
    loss = fitted("random", torch.randn(4, 6, 32))
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [2]])
    clean = ask(loss, ours, theirs, mask)
    ours[~mask] = float("nan")
    theirs[~mask] = float("inf")
    assert torch.equal(ask(loss, ours, theirs, mask), clean)


def test_an_adapter_is_made_where_widths_differ_and_learns():
    theirs = torch.randn(16, 8, 32)
    loss = fitted(RandomProjection(dim=6), theirs, student=tiny_bert(hidden_size=16))
    ours = (theirs @ torch.randn(32, 16)) / 32**0.5
    before = ask(loss, ours, theirs)
    (adapter,) = loss.parameters()
    assert adapter.shape == (16, 6)
    optimizer = torch.optim.Adam([adapter], lr=0.05)
    for _ in range(100):
        step = DistillationStep(
            {},
            student_features={loss.features().student[0]: ours},
            teacher_features={loss.features().teacher[0]: theirs},
        )
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    assert loss(step) < 0.7 * before


def test_feature_maps_of_other_resolution_and_layernorm():
    loss = fitted(None, torch.randn(4, 16, 8))
    maps = torch.randn(2, 8, 4, 4)
    same = ask(loss, maps, maps)
    assert same == 0
    smooth = torch.ones(2, 8, 8, 8) * torch.arange(8.0)[:, None, None]
    assert ask(loss, smooth[..., :4, :4], smooth) < 1e-10
    normal = fitted(None, torch.randn(4, 16, 8), normalize="layernorm")
    tokens = torch.randn(2, 5, 8)
    assert ask(normal, 3 * tokens + 1, tokens) < 1e-6
    with pytest.raises(RMTKDError, match="expected the same positions"):
        ask(loss, torch.randn(2, 5, 8), torch.randn(2, 6, 8))
