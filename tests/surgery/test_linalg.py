"""Decompositions that fail say why: what is not finite is counted, what was added is named, what is beyond help is
refused."""

from __future__ import annotations

import logging

import pytest
import torch

from optimum_rmtkd import CalibrationError, RMTKDConfig, narrow
from optimum_rmtkd.surgery import linalg, narrow_to
from optimum_rmtkd.surgery.bases import (
    fisher_directions,
    natural_gauge,
    neuron_projection,
    pivoted_cholesky,
    polar_alignment,
    query_key_directions,
    symmetric_root,
    value_directions,
)
from optimum_rmtkd.surgery.refit import least_squares_update

from . import zoo


def gram(rank: int, size: int, dtype=torch.float64) -> torch.Tensor:
    x = torch.randn(4 * size, rank, dtype=dtype) @ torch.randn(rank, size, dtype=dtype)
    return x.T @ x / len(x)


# The ladder


def test_a_definite_matrix_is_decomposed_as_it_is(caplog):
    matrix = gram(9, 9)
    factor = linalg.cholesky(matrix, "A test", (0.0, 1e-3))
    assert torch.equal(factor, torch.linalg.cholesky(matrix))
    values, vectors = linalg.eigh(matrix, "A test")
    assert torch.equal(values, torch.linalg.eigh(matrix)[0])
    assert (vectors * values @ vectors.T - matrix).abs().max() < 1e-12 * matrix.abs().max() * 9
    u, s, vt = linalg.svd(matrix, "A test")
    assert ((u * s) @ vt - matrix).abs().max() < 1e-12 * matrix.abs().max() * 9
    assert not caplog.records


def test_the_jitter_that_helped_is_named(caplog):
    matrix = gram(9, 9)
    matrix -= (torch.linalg.eigvalsh(matrix)[0] + 3e-6 * matrix.diagonal().mean()) * torch.eye(9)
    factor = linalg.cholesky(matrix, "Refit of layer 7", (0.0, 1e-8, 1e-5))
    assert "Refit of layer 7: positive definite only with 1e-05 of the mean of its diagonal" in caplog.text
    added = factor @ factor.T - matrix
    assert torch.allclose(added, 1e-5 * matrix.diagonal().mean() * torch.eye(9, dtype=torch.float64), atol=1e-12)


def test_a_pivot_of_rounding_size_is_no_pivot(caplog):
    matrix = gram(9, 9)
    matrix -= (torch.linalg.eigvalsh(matrix)[0] - 1e-9 * matrix.diagonal().mean()) * torch.eye(9)
    linalg.cholesky(matrix, "A test", (0.0, 1e-6))
    assert not caplog.records
    factor = linalg.cholesky(matrix, "A test", (0.0, 1e-6), resolution=1e-7)
    assert factor.diagonal().square().min() > 5e-7 * matrix.diagonal().mean()
    assert "1e-06" in caplog.text


def test_an_indefinite_matrix_is_refused_in_words():
    with pytest.raises(CalibrationError, match=r"A test: .* shape \(4, 4\) is not positive definite, even with 0.001"):
        linalg.cholesky(-torch.eye(4, dtype=torch.float64), "A test")


def test_an_iteration_that_does_not_converge_climbs(caplog, monkeypatch):
    honest, seen = torch.linalg.eigh, []

    def stubborn(matrix):
        seen.append(matrix)
        if len(seen) < 3:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return honest(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    matrix = gram(5, 5)
    values, _ = linalg.eigh(matrix, "Directions of somewhere")
    assert len(seen) == 3 and "Directions of somewhere: decomposed into eigenvectors only with 1e-08" in caplog.text
    assert torch.allclose(values, honest(matrix)[0], rtol=1e-6)
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (_ for _ in ()).throw(torch.linalg.LinAlgError("never")))
    with pytest.raises(CalibrationError, match="Directions of somewhere: .* is not decomposed into eigenvectors"):
        linalg.eigh(matrix, "Directions of somewhere")


SQUARE, HEADS = torch.ones(6, 6, dtype=torch.float64), torch.ones(2, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    "compute, matrix",
    [
        (lambda m: symmetric_root(m), SQUARE),
        (lambda m: fisher_directions(m, None), SQUARE),
        (lambda m: fisher_directions(torch.eye(6, dtype=torch.float64), m), SQUARE),
        (lambda m: pivoted_cholesky(m, 3), SQUARE),
        (lambda m: neuron_projection(m, torch.tensor([0, 2])), SQUARE),
        (lambda m: polar_alignment(m[:, :2]), SQUARE),
        (lambda m: natural_gauge(m, m), SQUARE),
        (lambda m: value_directions(m, torch.eye(6, dtype=torch.float64).expand(2, 6, 6)), HEADS),
        (lambda m: query_key_directions(torch.eye(6, dtype=torch.float64).expand(2, 6, 6), m), HEADS),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_counted(compute, matrix, value):
    broken = matrix.clone()
    broken[..., 0, 2] = broken[..., 2, 0] = value
    with pytest.raises(CalibrationError, match=r"\d+ of \d+ entries .* are NaN or infinite"):
        compute(broken)


# The refit


@pytest.mark.parametrize("ridge", [1e-12, 1e-9, 1e-8])
@pytest.mark.parametrize("intercept", [True, False])
def test_a_ridge_below_rounding_is_raised_and_said(ridge, intercept, caplog):
    """Redundant inputs, whose Gram matrix in fp32 products is not positive definite."""
    x = torch.randn(400, 5) @ torch.randn(5, 40)
    wanted = x @ torch.randn(40, 3)
    update, shift = least_squares_update([x], [wanted], ridge, intercept, what="Refit of somewhere")
    assert f"Refit of somewhere, ridge={ridge:g}: positive definite only with" in caplog.text
    assert ((x.double() @ update.T + shift) - wanted).square().mean() < 1e-4 * wanted.square().mean()
    assert update.abs().max() < 100  # of the order of residuals over inputs: null directions are not followed far


@pytest.mark.parametrize("ridge", [1e-9, 1e-4])
def test_a_ridge_that_is_enough_stays_what_it_is(ridge, caplog):
    x, residual = torch.randn(200, 12), torch.randn(200, 4)
    update, _ = least_squares_update([x], [residual], ridge, False)
    x, residual = x.double(), residual.double()
    penalty = ridge * (x * x).sum(0).mean() * torch.eye(12, dtype=torch.float64)
    assert torch.allclose(update, torch.linalg.solve(x.T @ x + penalty, x.T @ residual).T, atol=1e-5)
    assert not caplog.records


def test_residuals_that_are_not_finite_are_refused():
    x, residual = torch.randn(20, 4), torch.randn(20, 2)
    residual[3, 1] = float("inf")
    with pytest.raises(CalibrationError, match="Refit of it: .* are NaN or infinite"):
        least_squares_update([x], [residual], 1e-4, False, what="Refit of it")


def test_units_of_columns_change_nothing_where_each_has_its_own_ridge():
    x, residual = torch.randn(300, 12), torch.randn(300, 4)
    scale = torch.tensor([1e-2, 1.0, 30.0]).repeat_interleave(4)
    plain, _ = least_squares_update([x], [residual], 0.1, False, unit=4)
    scaled, _ = least_squares_update([x * scale], [residual], 0.1, False, unit=4)
    assert torch.allclose(scaled * scale, plain, rtol=1e-4, atol=1e-6)
    other, _ = least_squares_update([x * scale], [residual], 0.1, False)
    assert not torch.allclose(other * scale, plain, rtol=1e-1)


@pytest.mark.parametrize("ridge", [1e-13, 1e-9])
def test_narrow_survives_a_tiny_ridge(ridge, caplog):
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")
    with torch.no_grad():  # a stream of half its rank: what reads it is redundant in its inputs
        model.bert.embeddings.LayerNorm.weight[16:] = model.bert.embeddings.LayerNorm.weight[:16] * 0
        model.bert.embeddings.LayerNorm.bias[16:] = 0
    recipe = RMTKDConfig(ridge=ridge, target_reduction=0.3, round_to=4, min_width=4, calibration_samples=48)
    with caplog.at_level(logging.WARNING):
        small = narrow(model, data, recipe, progress=False)
    assert zoo.outputs(small, data[0]).isfinite().all()
    assert f"ridge={ridge:g}: positive definite only with" in caplog.text


# The name of the tensor


def test_rows_of_a_table_that_no_text_uses_are_looked_at_too():
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[2, 3] = float("nan")  # ids begin at 5
    recipe = RMTKDConfig(round_to=1, min_width=1, calibration_samples=48)
    with pytest.raises(CalibrationError, match="the first is bert.embeddings.word_embeddings.weight"):
        narrow_to(model, data, {"embedding": 12}, recipe, progress=False)
