from __future__ import annotations

import pytest
import torch
from torch import nn

from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.reparameterization import Powerpropagation, fold


def linear(**arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    plain = model[0].weight.detach().clone()
    Powerpropagation(target_modules=["0"], **arguments).apply(model)
    return model, plain


@pytest.mark.parametrize("exponent", [1.5, 2.0, 4.0])
def test_function_is_unchanged_and_the_gradient_scaled(exponent):
    model, plain = linear(exponent=exponent)
    assert torch.allclose(model[0].weight, plain, atol=1e-7)
    theta = model[0].parametrizations.weight.original
    direction = torch.randn(5, 6)
    (model[0].weight * direction).sum().backward()
    assert torch.allclose(theta.grad, exponent * theta.abs() ** (exponent - 1) * direction, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("exponent", [1.5, 2.0, 3.0])
def test_zero_stays_zero_without_nan(exponent):
    model = nn.Sequential(nn.Linear(3, 3))
    nn.init.zeros_(model[0].weight)
    Powerpropagation(exponent, target_modules=["0"]).apply(model)
    model(torch.ones(1, 3)).sum().backward()
    assert torch.equal(model[0].parametrizations.weight.original.grad, torch.zeros(3, 3))


def test_pruning_happens_at_the_last_fold_only():
    how = Powerpropagation(sparsity=0.5, target_modules=["0"])
    model, plain = linear()
    fold(model)
    assert torch.allclose(model[0].weight, plain, atol=1e-7) and (model[0].weight != 0).all()
    how.apply(model)
    fold(model, how)
    zero = model[0].weight == 0
    assert int(zero.sum()) == 15 and plain[zero].abs().max() <= plain[~zero].abs().min()


def test_refusals():
    for bad in ({"exponent": 1.0}, {"sparsity": 1.0}):
        with pytest.raises(RMTKDError):
            Powerpropagation(**bad)
