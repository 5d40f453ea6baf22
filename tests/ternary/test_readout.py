"""Ridge readout: against the normal equations, against refitting without each sample, and its scale to logits."""

from __future__ import annotations

import pytest
import torch

from optimum_rmtkd import RMTKDError
from optimum_rmtkd.ternary.readout import fit_readout, one_hot, probability_scale


def data(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, generator=generator, dtype=torch.float64) + 3
    y = h[:, :2] @ torch.randn(2, 3, generator=generator, dtype=torch.float64)
    return h, y + torch.randn(n, 3, generator=generator, dtype=torch.float64)


def by_normal_equations(h, y, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    centred = h - h.mean(0)
    gram = centred.T @ centred
    strength = ridge * gram.diagonal().mean()
    weight = torch.linalg.solve(gram + strength * torch.eye(h.shape[1], dtype=h.dtype), centred.T @ (y - y.mean(0))).T
    return weight, y.mean(0) - weight @ h.mean(0)


@pytest.mark.parametrize(("n", "d"), [(60, 10), (20, 50)])
def test_solution(n, d):
    h, y = data(n, d)
    fit = fit_readout(h, y, ridge=0.1)
    weight, bias = by_normal_equations(h, y, 0.1)
    assert torch.allclose(fit.weight, weight) and torch.allclose(fit.bias, bias)


@pytest.mark.parametrize("ridge", [0.3, 1e-8])
@pytest.mark.parametrize(("n", "d"), [(25, 8), (15, 30)])
def test_left_out_is_the_fit_without_the_sample(n, d, ridge):
    """The oracle refits n times, at the same absolute ridge. Its bias is fitted again; the closed form accounts for
    that."""
    h, y = data(n, d)
    fit = fit_readout(h, y, ridge=ridge)
    strength = ridge * (h - h.mean(0)).square().sum(0).mean()
    for i in range(n):
        rest = torch.arange(n) != i
        unit = (h[rest] - h[rest].mean(0)).square().sum(0).mean()
        weight, bias = by_normal_equations(h[rest], y[rest], float(strength / unit))
        assert torch.allclose(fit.left_out[i], h[i] @ weight.T + bias)


@pytest.mark.parametrize("n", [40, 25])
def test_choice_of_the_ridge(n):
    h, y = data(n, 30)
    fit = fit_readout(h, y)
    errors = {r: fit_readout(h, y, r).error for r in (1e-8, 1e-4, 1e-2, 1.0, 100.0)}
    assert fit.error <= min(errors.values()) and errors[1e-8] > 1.5 * fit.error
    test_h, test_y = data(2000, 30)
    wrong = fit_readout(h, y, 1e-8)
    risk = [float((test_h @ f.weight.T + f.bias - test_y).square().mean()) for f in (fit, wrong)]
    assert risk[0] < risk[1]


def test_constant_features():
    with pytest.raises(RMTKDError, match="4 features in front of the readout are constant over 9 samples"):
        fit_readout(torch.ones(9, 4), torch.randn(9, 1))


def test_scale_to_logits():
    """Scores drawn as probabilities of a logistic model at temperature 1/5: the factor is found again."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((5 * scores).softmax(1), 1, generator=generator)[:, 0]
    assert probability_scale(scores, labels) == pytest.approx(5, rel=0.1)


def test_one_hot():
    assert one_hot(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
