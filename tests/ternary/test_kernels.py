"""Functionals against quadrature and Monte Carlo, kernels against closed forms, and their equivalents on Gaussian
mixtures."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from optimum_rmtkd import CalibrationError, RMTKDError
from optimum_rmtkd.ternary.diagnostics import diagnose, standardizer
from optimum_rmtkd.ternary.functionals import (
    Activation,
    StepFunction,
    activation_names,
    get_activation,
    quadrature,
    register_activation,
)
from optimum_rmtkd.ternary.kernels import (
    RandomLayer,
    dense_chain,
    equivalent,
    exact_kernels,
    kernel_coefficients,
    without_shift,
)

from .networks import DEPTH, SEEDS, dense_kernels, error, mixture, samples


CLOSED = ("relu", "leaky_relu", "linear", "erf", "cos", "sign")
STEPS = StepFunction((-0.7, 0.3, 1.6), (-0.5, 0.25, 0.1, 2.0))


@pytest.mark.parametrize("t", [0.2, 1.0, 2.5])
@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_agree_with_quadrature(name, t):
    activation = get_activation(name)
    closed, numeric = activation.functionals(t), quadrature(activation.function, t, activation.knots)
    for item in dataclasses.fields(closed):
        expected = getattr(closed, item.name)
        if not (activation.jumps and item.name == "taudot2"):
            assert getattr(numeric, item.name) == pytest.approx(expected, abs=1e-8), item.name
    assert activation.jumps == math.isinf(closed.taudot2)


@pytest.mark.parametrize("t", [0.4, 1.0, 1.9])
def test_steps_agree_with_quadrature(t):
    closed, numeric = STEPS.functionals(t), quadrature(STEPS, t, STEPS.thresholds)
    for name in ("mean", "tau2", "g1", "g2", "g4"):
        assert getattr(numeric, name) == pytest.approx(getattr(closed, name), abs=1e-8)


@pytest.mark.parametrize("t", [10.0, 300.0])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "gelu"])
def test_quadrature_of_what_bends_in_a_narrow_place(name, t):
    """At a large t, against the trapezoidal rule with 4 million points."""
    activation = get_activation(name)
    found = activation.functionals(t)
    z = torch.linspace(-12, 12, 4_000_001, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    y = activation(t * z)
    mean = float((weight * y).sum())
    second = z.square() - 1
    oracle = {
        "mean": mean,
        "tau2": float((weight * (y - mean).square()).sum()),
        "g1": float((weight * z * (y - mean)).sum()) / t,
        "g2": float((weight * second * (y - mean)).sum()) / t**2,
        "g4": float((weight * second * (y - mean).square()).sum()) / (2 * t**2),
    }
    for item, expected in oracle.items():
        assert getattr(found, item) == pytest.approx(expected, rel=1e-8, abs=1e-12), item


def test_sign_is_a_step():
    step, sign = StepFunction((0.0,), (-1, 1)).functionals(0.8), get_activation("sign").functionals(0.8)
    assert [step.tau2, step.g1, step.g2, step.g4] == pytest.approx([sign.tau2, sign.g1, sign.g2, sign.g4])


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh"])
def test_functionals_by_their_derivatives(name):
    """The definitions with derivatives, by Monte Carlo over 4 million draws, against the Stein forms."""
    activation, t = get_activation(name), 0.9
    found = activation.functionals(t)
    generator = torch.Generator().manual_seed(0)
    x = (t * torch.randn(4_000_000, generator=generator, dtype=torch.float64)).requires_grad_()
    y = activation(x)
    slope, y = torch.autograd.grad(y.sum(), x)[0], y.detach()
    assert float(y.mean()) == pytest.approx(found.mean, abs=2e-3)
    assert float(y.var()) == pytest.approx(found.tau2, abs=2e-3)
    assert float(slope.mean()) == pytest.approx(found.g1, abs=2e-3)
    assert float(slope.square().mean()) == pytest.approx(found.taudot2, abs=2e-3)
    # g2 = 2 d mean / d s and g4 = d E sigma^2 / d s - mean g2, s = t^2, by central differences
    h = 1e-5
    up, down = (activation.functionals(math.sqrt(t * t + sign * h)) for sign in (1, -1))
    assert (up.mean - down.mean) / h == pytest.approx(found.g2, abs=1e-6)
    raw = [f.tau2 + f.mean**2 for f in (up, down)]
    assert (raw[0] - raw[1]) / (2 * h) - found.mean * found.g2 == pytest.approx(found.g4, abs=1e-6)


def test_unknown_activation_is_answered_with_the_known_ones():
    with pytest.raises(RMTKDError, match="'swoosh'.*cos, erf, gelu"):
        get_activation("swoosh")


def test_own_activation():
    register_activation(Activation("test_square", torch.square))
    assert "test_square" in activation_names()
    found = get_activation("test_square").functionals(1.5)
    assert [found.mean, found.tau2, found.g1, found.g2] == pytest.approx([2.25, 2 * 1.5**4, 0, 2], abs=1e-8)


@pytest.mark.parametrize("t", [0.0, -1.0, math.nan, math.inf])
def test_functionals_need_a_spread(t):
    with pytest.raises(RMTKDError, match="positive standard deviation"):
        get_activation("gelu").functionals(t)


def test_activation_that_is_not_finite():
    with pytest.raises(RMTKDError, match="not finite"):
        quadrature(torch.log, 1.0)


@pytest.mark.parametrize(
    ("thresholds", "levels"), [((0.0, 0.0), (1, 2, 3)), ((1.0, 0.0), (1, 2, 3)), ((0.0,), (1, 2, 3)), ((), (1,))]
)
def test_step_functions_are_checked(thresholds, levels):
    with pytest.raises(RMTKDError, match="ascending"):
        StepFunction(thresholds, levels)


# Kernels


def points(n: int = 12, p: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / math.sqrt(p)


def test_erf_series_against_its_closed_form():
    """Williams 1997: E erf(u) erf(v) = 2/pi asin(2 k_uv / sqrt((1 + 2 k_uu)(1 + 2 k_vv)))."""
    x = points()
    k = x @ x.T
    scale = (1 + 2 * k.diagonal()).sqrt()
    expected = 2 / math.pi * torch.asin(2 * k / torch.outer(scale, scale))
    assert torch.allclose(exact_kernels(x, [RandomLayer(get_activation("erf"))])[0], expected, atol=1e-12)


def test_relu_closed_form_against_its_series():
    x, layer = points(), RandomLayer(get_activation("relu"), 0.3)
    anonymous = Activation("relu_by_series", torch.relu, (0.0,))
    closed, series = exact_kernels(x, [layer]), exact_kernels(x, [RandomLayer(anonymous, 0.3)])
    assert torch.allclose(closed[0], series[0], atol=1e-6)  # 40 terms, correlations up to 0.6
    assert torch.allclose(closed[1], series[1], atol=1e-4)


@pytest.mark.parametrize("activation", [get_activation("relu"), get_activation("gelu"), STEPS], ids=lambda a: a.name)
def test_kernel_against_a_very_wide_layer(activation):
    """Monte Carlo over 400,000 random neurons."""
    x, mean = points(n=6), 0.2
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(20, 400_000, generator=generator, dtype=torch.float64)
    h = activation(x @ drawn) - mean
    expected = exact_kernels(x, [RandomLayer(activation, mean)])[0]
    assert torch.allclose(h @ h.T / 400_000, expected, atol=0.01)


def test_ntk_against_autograd():
    """NTK of two wide GELU layers: sum over all weights of products of gradients."""
    torch.manual_seed(0)
    x, width, activation = points(n=4), 4000, get_activation("gelu")
    total = torch.zeros(4, 4, dtype=torch.float64)
    for _ in range(3):
        weights = [torch.randn(20, width, dtype=torch.float64), torch.randn(width, dtype=torch.float64)]
        for w in weights:
            w.requires_grad_()
        out = activation(x @ weights[0]) / math.sqrt(width) @ weights[1]
        rows = [torch.cat([g.reshape(-1) for g in torch.autograd.grad(o, weights, retain_graph=True)]) for o in out]
        total += torch.stack(rows) @ torch.stack(rows).T / 3
    ck, ntk = exact_kernels(x, [RandomLayer(activation)])
    assert torch.allclose(ntk, total, atol=0.04)
    assert not torch.allclose(ck, total, atol=0.2)


def test_ntk_of_steps_needs_a_surrogate():
    x = points()
    ck, ntk = exact_kernels(x, [RandomLayer(STEPS)])
    assert bool(torch.isnan(ntk).all()) and not bool(torch.isnan(ck).any())
    surrogate = StepFunction((0.0,), (0.1, 0.9))
    assert not bool(torch.isnan(exact_kernels(x, [RandomLayer(STEPS, surrogate=surrogate)])[1]).any())


def test_samples_that_are_almost_the_same_are_named(caplog):
    x = points()
    x[1] = 0.999 * x[0] + 0.03 * x[1]
    exact_kernels(x, [RandomLayer(get_activation("relu"))])
    assert not caplog.records  # a closed form
    exact_kernels(x, [RandomLayer(STEPS)])
    assert "correlation of 0.99" in caplog.text and "the 40 terms of the series may leave out" in caplog.text
    caplog.clear()
    exact_kernels(points(), [RandomLayer(STEPS, 0.3), RandomLayer(get_activation("tanh"))])
    assert not caplog.records


def test_without_shift_leaves_the_rest():
    k = points() @ points().T
    eye = torch.eye(len(k), dtype=k.dtype)
    assert torch.allclose(without_shift(k + 0.7 * eye, k), k)


def test_coefficients_by_hand():
    first, second = dense_chain(get_activation("relu"), 2, 1.3)
    c = kernel_coefficients([first, second], 1.3)
    assert c.a1 == pytest.approx(1 / 16) and c.b1 == pytest.approx(3 / 16)
    g2 = [1 / (math.sqrt(2 * math.pi) * f.t) for f in (first, second)]
    assert c.a3 == pytest.approx(0.25 * g2[0] ** 2 / 2 + g2[1] ** 2 / 16 / 2)
    assert c.kappa2 == pytest.approx(second.tau2 + 0.5 * (first.tau2 + 0.5 * 1.69))


# Bar 2: relative spectral error of (CK, NTK). Largest: p=256 .0344 .100 (5 seeds), p=800 .0163 .0512 (2 seeds).
EQUIVALENT = {256: (0.04, 0.11), 800: (0.022, 0.06)}


@pytest.mark.parametrize(("p", "n"), [(256, 480), pytest.param(800, 1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", SEEDS)
def test_dense_kernels_are_near_their_equivalents(p, n, seed):
    x, labels, tau0 = samples(p, n, seed)
    coefficients = kernel_coefficients(dense_chain(get_activation("relu"), DEPTH, tau0), tau0)
    for kernel, kind, bar in zip(dense_kernels(x, tau0), ("ck", "ntk"), EQUIVALENT[p]):
        found = error(kernel, equivalent(x, labels, mixture(p), coefficients, tau0, kind))
        print(f"p={p} seed={seed} {kind} {found:.4f}")
        assert found < bar


def test_the_error_of_the_equivalent_vanishes_with_the_dimension():
    """p 256 -> 1024 about halves it, and no constant stays on the diagonal."""
    errors, diagonals = {"ck": [], "ntk": []}, {"ck": [], "ntk": []}
    for p in (256, 1024):
        x, labels, tau0 = samples(p, 3 * p // 2, 0)
        coefficients = kernel_coefficients(dense_chain(get_activation("relu"), DEPTH, tau0), tau0)
        for kernel, kind in zip(dense_kernels(x, tau0), ("ck", "ntk")):
            found = equivalent(x, labels, mixture(p), coefficients, tau0, kind)
            errors[kind].append(error(kernel, found))
            diagonals[kind].append(abs(float((found - kernel).diagonal().mean())))
    for kind in errors:
        assert errors[kind][1] < 0.68 * errors[kind][0], errors
        assert diagonals[kind][1] < 0.6 * diagonals[kind][0] or diagonals[kind][1] < 0.005, diagonals


def test_equivalent_needs_every_term():
    """Dropping the covariance terms (a2, a3) must be seen: the bar above is no tolerance that hides them."""
    x, labels, tau0 = samples(256, 480, 0)
    coefficients = kernel_coefficients(dense_chain(get_activation("relu"), DEPTH, tau0), tau0)
    kernel = dense_kernels(x, tau0)[0]
    for name in ("a1", "a2"):
        wrong = equivalent(x, labels, mixture(256), dataclasses.replace(coefficients, **{name: 0.0}), tau0)
        assert error(kernel, wrong) > 2 * EQUIVALENT[256][0]


# Diagnostics


def test_standardizer():
    x = torch.randn(500, 30, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 31) + 7
    for how in ("global", "feature"):
        mean, factor = standardizer(x, how)
        z = (x.double() - mean) * factor
        assert z.mean(0).abs().max() < 1e-12
        assert float(z.square().sum(1).mean()) == pytest.approx(1)
    assert torch.allclose(z.square().mean(0), torch.full((30,), 1 / 30, dtype=torch.float64))


def test_diagnostics_of_theory_and_of_a_cone():
    x = samples(400, 600, 0)[0]
    good = diagnose(x)
    assert good.warnings() == [] and good.ratio == 1.5
    assert good.effective_rank > 200 and good.max_coherence < 0.5
    direction = torch.linspace(1, 2, 400, dtype=torch.float64)
    bad = diagnose(0.05 * x + torch.randn(600, 1, generator=torch.Generator().manual_seed(0)) * direction)
    assert bad.effective_rank < 2 and bad.mean_coherence > 0.9 and bad.norm_dispersion > 1
    assert len(bad.warnings()) == 3 and "effective rank is 1." in bad.warnings()[-1]


def test_features_that_are_not_centred_are_named():
    x, _, tau0 = samples(400, 600, 0)
    assert diagnose(x).mean_share < 1e-10
    found = diagnose(x + 1 / 20)  # a shift of norm 1
    assert found.mean_share == pytest.approx(1 / (1 + tau0**2))
    assert "not centred: their mean holds" in found.warnings()[0]


def test_few_and_constant_features_are_named():
    x = points(50, 20)
    x[:, 3] = 0
    found = diagnose(x)
    assert found.constant_features == 1
    assert [sentence.split()[0] for sentence in found.warnings()] == ["p=20", "1"]


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.ones(10, 4), "same 4 features"),
        (torch.full((10, 4), math.nan), "not finite"),
        (torch.ones(4), "expected \\(samples, features\\)"),
        (torch.ones(1, 4), "two samples"),
    ],
)
def test_features_that_cannot_be_used(x, match):
    with pytest.raises(CalibrationError, match=match):
        standardizer(x)
