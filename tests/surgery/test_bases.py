"""The pure functions of surgery against slow oracles: numpy, scipy, and a search among alternatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optimum_rmtkd import CalibrationError
from optimum_rmtkd.surgery.bases import (
    fisher_directions,
    head_projection,
    identity_projection,
    neuron_order,
    neuron_projection,
    pivoted_cholesky,
    polar_alignment,
    query_key_directions,
    rotate_onto_ones,
    symmetric_root,
    value_directions,
)
from optimum_rmtkd.surgery.refit import least_squares_update, norm_fit


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def moment(*shape: int) -> torch.Tensor:
    """A well-conditioned second moment (..., d, d) of 3 d samples."""
    x = normal(*shape[:-1], 3 * shape[-1], shape[-1]) * torch.linspace(0.5, 2.0, shape[-1], dtype=torch.float64)
    return x.mT @ x / (3 * shape[-1])


def orthonormal(dim: int, rank: int) -> torch.Tensor:
    return torch.linalg.qr(normal(dim, rank))[0]


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() < tolerance


def assert_same_span(a: torch.Tensor, b: torch.Tensor) -> None:
    assert_close(a @ a.T, b @ b.T)


# Choice of features


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_pivoted_cholesky_is_a_pivoted_qr(rank):
    linalg = pytest.importorskip("scipy.linalg")
    x = normal(60, 20) * torch.linspace(0.3, 3.0, 20, dtype=torch.float64)[torch.randperm(20)]
    gram = x.T @ x
    pivots, residual = pivoted_cholesky(gram, rank)
    assert pivots.tolist() == linalg.qr(x.numpy(), pivoting=True, mode="r")[1][:rank].tolist()
    assert len(residual) == rank + 1
    for k in range(rank + 1):
        kept = pivots[:k]
        schur = gram - gram[:, kept] @ torch.linalg.solve(gram[kept][:, kept], gram[kept]) if k else gram
        assert abs(residual[k] - schur.trace()) < 1e-9 * gram.trace()


def test_pivoted_cholesky_goes_on_over_several_panels():
    x = torch.randn(400, 300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gram = (x * torch.linspace(1, 3, 300, dtype=torch.float64)).T @ x
    gram = gram @ gram.T
    pivots, residual = pivoted_cholesky(gram, 290)
    left = gram.clone()  # one rank-one update a pivot, as in a textbook
    for step, pivot in enumerate(pivots.tolist()):
        assert residual[step] == pytest.approx(float(left.trace()), rel=1e-9)
        assert pivot == int(left.diagonal().argmax())
        left -= torch.outer(left[pivot], left[pivot]) / left[pivot, pivot].clone()
        left[pivot], left[:, pivot] = 0.0, 0.0


def test_pivoted_cholesky_of_a_low_rank_gram_chooses_every_feature_once():
    x = normal(40, 4) @ normal(4, 12)
    pivots, residual = pivoted_cholesky(x.T @ x, 12)
    assert sorted(pivots.tolist()) == list(range(12))
    assert residual[3] > 1e-3 * residual[0]
    assert residual[4:].max() < 1e-9 * residual[0]


def test_what_rounding_has_left_of_dependent_features_is_not_chosen_from():
    """Fp32 products leave more of large features that others span than small ones of no effect have at all."""
    x = (normal(400, 4) @ normal(4, 12)).float()
    gram = (x.T @ x).double() / len(x)
    effect = torch.ones(12, dtype=torch.float64)
    effect[[2, 7]] = 1e-3
    order, residual = neuron_order(gram, effect)
    assert set(order[-2:].tolist()) == {2, 7}
    assert bool((residual.diff() <= 0).all()) and residual[4] < 1e-5 * residual[0]


def test_neuron_order_sees_features_through_their_consumer():
    second, effect = moment(10), torch.rand(10, dtype=torch.float64)
    effect[3] = 0.0  # nobody reads this neuron
    order, residual = neuron_order(second, effect)
    assert order[-1] == 3
    assert residual[0] == pytest.approx(float((second.diagonal() * effect.square()).sum()))
    assert residual[9] < 1e-12


def test_neuron_projection_is_the_best_linear_prediction():
    x, kept = normal(500, 3) @ normal(3, 8) + 0.3 * normal(500, 8), torch.tensor([1, 4, 6])
    cut = neuron_projection(x.T @ x / len(x), kept)
    oracle = np.linalg.lstsq(x[:, kept].numpy(), x.numpy(), rcond=None)[0]
    assert_close(cut.decode, torch.tensor(oracle).T, 1e-6)
    assert_close(x @ cut.encode, x[:, kept])
    assert torch.equal(cut.index, kept)


@pytest.mark.parametrize("heads", [False, True])
def test_what_varies_about_a_mean_is_put_back_where_it_was(heads):
    mean = 5 * normal(6)
    x = normal(50, 2) @ normal(2, 6) + mean
    centred = (x - x.mean(0)).T @ (x - x.mean(0)) / 50
    cut = neuron_projection(centred, torch.tensor([1, 4]), x.mean(0))
    if heads:
        basis = torch.linalg.eigh(centred)[1].flip(1)[None]
        cut = head_projection(basis, basis, 2, x.mean(0))
    assert_close(x @ cut.encode @ cut.decode.T + cut.offset, x, 1e-6)


def test_neuron_projection_survives_silent_neurons_and_refuses_nan():
    second = moment(6)
    second[2] = second[:, 2] = 0.0
    kept = torch.tensor([0, 2, 5])
    decode = neuron_projection(second, kept).decode
    assert torch.equal(decode[kept], torch.eye(3, dtype=torch.float64))
    assert decode.isfinite().all()
    with pytest.raises(CalibrationError, match="not positive definite"):
        neuron_projection(-second, kept)


# Bases of the stream


def test_polar_alignment_keeps_the_span_and_comes_closer_to_the_axes():
    basis = orthonormal(12, 5)
    aligned = polar_alignment(basis)
    assert_close(aligned.T @ aligned, torch.eye(5, dtype=torch.float64))
    assert_same_span(aligned, basis)
    rows = pivoted_cholesky(basis @ basis.T, 5)[0].sort().values
    block = aligned[rows]  # symmetric positive: the polar factor of those rows is gone
    assert_close(block, block.T)
    assert torch.linalg.eigvalsh(block).min() > 0
    assert block.trace() > basis[rows].trace()


def test_polar_alignment_of_everything_is_the_identity():
    assert_close(polar_alignment(orthonormal(9, 9)), torch.eye(9, dtype=torch.float64))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rotate_onto_ones(sign):
    basis, direction = orthonormal(10, 4), normal(4)
    direction = sign * direction / direction.norm()
    ambient = basis @ direction
    turned = rotate_onto_ones(basis, direction)
    assert_close(turned.T @ turned, torch.eye(4, dtype=torch.float64))
    assert_same_span(turned, basis)
    along = turned.T @ ambient  # the same vector in the new coordinates
    assert_close(along * along[0].sign(), torch.full((4,), 0.5, dtype=torch.float64))
    centred = lambda x: x - x.mean(-1, keepdim=True)  # noqa: E731  what a layer norm does first
    x = normal(7, 10)
    assert_close(centred(x @ turned), (x - x @ torch.outer(ambient, ambient)) @ turned)


def test_rotate_onto_ones_leaves_alone_what_is_there_already():
    basis = orthonormal(10, 4)
    ones = torch.full((4,), 0.5, dtype=torch.float64)
    assert_close(rotate_onto_ones(basis, ones), basis)
    assert_close(rotate_onto_ones(basis, -ones), basis)


@pytest.mark.parametrize("shape", [(8,), (3, 8)])
def test_symmetric_root_and_inverse(shape):
    matrix = moment(*shape)
    root, inverse = symmetric_root(matrix)
    eye = torch.eye(8, dtype=torch.float64).expand(matrix.shape)
    assert_close(root @ root, matrix)
    assert_close(root, root.mT)
    assert_close(root @ inverse, eye)
    assert_close(inverse @ matrix @ inverse, eye)


def test_symmetric_root_of_a_singular_matrix_stays_an_inverse_pair():
    x = normal(3, 8)
    root, inverse = symmetric_root(x.T @ x)
    assert_close(root @ root, x.T @ x, 1e-6)
    assert_close(root @ inverse, torch.eye(8, dtype=torch.float64), 1e-6)
    assert symmetric_root(torch.zeros(2, 2, dtype=torch.float64))[0].isfinite().all()


def test_fisher_directions_without_gradient_are_the_eigenvectors():
    second = moment(7)
    basis, scores = fisher_directions(second, None)
    assert_close(scores, torch.linalg.eigvalsh(second).flip(0))
    assert_close(second @ basis, basis * scores)
    assert_close(basis.T @ basis, torch.eye(7, dtype=torch.float64))


def test_fisher_directions_put_first_what_the_loss_sees():
    second = torch.diag(torch.tensor([9.0, 4.0, 1.0, 0.25], dtype=torch.float64))
    gradient = torch.diag(torch.tensor([0.0, 0.0, 2.0, 0.0], dtype=torch.float64))  # the loss reads feature 2 alone
    basis, scores = fisher_directions(second, gradient)
    assert basis.abs().argmax(0).tolist() == [2, 0, 1, 3]  # what it does not see follows by variance
    assert scores[0] == pytest.approx(2.0, rel=1e-3)
    second, gradient = moment(6), moment(6)
    basis, scores = fisher_directions(second, gradient)
    shrunk = gradient + 1e-3 * gradient.trace() / 6 * torch.eye(6, dtype=torch.float64)
    assert_close(basis.T @ shrunk @ basis, torch.diag(scores))  # no cross terms: costs add up
    assert (scores.diff() <= 0).all()


# Heads


def test_value_directions_invert_each_other_and_price_what_they_drop():
    context, effect = moment(3, 6), moment(3, 6)
    encode, decode, scores = value_directions(context, effect)
    eye = torch.eye(6, dtype=torch.float64).expand(3, 6, 6)
    assert_close(decode @ encode.mT, eye)
    assert_close(encode.mT @ decode, eye)
    width = 4
    lost = torch.eye(6, dtype=torch.float64) - decode[..., :width] @ encode[..., :width].mT  # error = lost @ context
    price = torch.einsum("hij,hji->h", effect, lost @ context @ lost.mT)
    assert_close(price, scores[:, width:].sum(-1))
    for head in range(3):  # nothing of the same rank is cheaper
        for _ in range(50):
            other = torch.eye(6, dtype=torch.float64) - normal(6, width) @ normal(width, 6) / 6
            assert (effect[head] @ other @ context[head] @ other.T).trace() > price[head]


def test_query_key_directions_keep_the_bilinear_form():
    query, key = moment(2, 6), moment(2, 6)
    encode_q, encode_k, _ = query_key_directions(query, key)
    assert_close(encode_q @ encode_k.mT, torch.eye(6, dtype=torch.float64).expand(2, 6, 6))
    q, k = normal(5, 6), normal(5, 6)
    assert_close((q @ encode_q[0]) @ (k @ encode_k[0]).T, q @ k.T)


def test_query_key_directions_are_the_best_low_rank_form():
    """Error of the logits q^T (1 - A) k, mean squared over independent q and k: tr(Sq (1 - A) Sk (1 - A)^T)."""
    query, key, rank = moment(1, 6), moment(1, 6), 2
    encode_q, encode_k, scores = query_key_directions(query, key)

    def error(left, right):
        lost = torch.eye(6, dtype=torch.float64) - left @ right.T
        return float((query[0] @ lost @ key[0] @ lost.T).trace())

    best_q, best_k = encode_q[0, :, :rank], encode_k[0, :, :rank]
    best = error(best_q, best_k)
    assert best == pytest.approx(float(scores[0, rank:].sum()), rel=1e-9)
    for _ in range(50):
        other = orthonormal(6, rank)
        assert error(other, other) > best
    for scale in (1e-3, 0.1, 1.0):
        for _ in range(50):
            assert error(best_q + scale * normal(6, rank), best_k + scale * normal(6, rank)) > best


def test_head_projection_is_block_diagonal():
    encode, decode = normal(3, 4, 4), normal(3, 4, 4)
    cut = head_projection(encode, decode, 2)
    assert cut.encode.shape == cut.decode.shape == (12, 6)
    x = normal(5, 12)
    by_head = torch.einsum("nhw,hwk->nhk", x.reshape(5, 3, 4), encode[..., :2]).reshape(5, 6)
    assert_close(x @ cut.encode, by_head)
    assert_close(cut.decode[4:8, 2:4], decode[1, :, :2])
    assert identity_projection(3).encode.equal(torch.eye(3, dtype=torch.float64))


# Regression


@pytest.mark.parametrize("intercept", [True, False])
def test_least_squares_update_is_lstsq(intercept):
    x, weight, shift = torch.randn(300, 6) + 1.0, torch.randn(4, 6), torch.randn(4)
    residual = x @ weight.T + shift + 0.1 * torch.randn(300, 4)
    update, offset = least_squares_update(list(x.split(70)), list(residual.split(70)), 1e-9, intercept)
    design = torch.cat([x, torch.ones(300, 1)], 1) if intercept else x
    oracle = torch.linalg.lstsq(design.double(), residual.double()).solution.T
    assert_close(update, oracle[:, :6], 1e-4)
    assert_close(offset, oracle[:, 6] if intercept else torch.zeros(4, dtype=torch.float64), 1e-4)


def test_least_squares_update_shrinks_by_its_ridge():
    x, residual = torch.randn(200, 5), torch.randn(200, 3)
    update, _ = least_squares_update([x], [residual], 0.5, False)
    gram = x.double().T @ x.double()
    penalty = 0.5 * gram.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    assert_close(update, torch.linalg.solve(gram + penalty, x.double().T @ residual.double()).T, 1e-5)


@pytest.mark.parametrize("intercept", [True, False])
def test_least_squares_update_of_nothing_is_exactly_nothing(intercept):
    update, shift = least_squares_update([torch.randn(50, 6)], [torch.zeros(50, 4)], 1e-4, intercept)
    assert torch.equal(update, torch.zeros(4, 6, dtype=torch.float64))
    assert torch.equal(shift, torch.zeros(4, dtype=torch.float64))


def test_norm_fit_is_a_regression_per_coordinate():
    u, target = normal(200, 3), normal(200, 3)
    u[:, 2] = 5.0  # constant: nothing to fit
    scale, shift, usable = norm_fit(u, target)
    assert usable.tolist() == [True, True, False]
    for k in (0, 1):
        slope, offset = np.polyfit(u[:, k].numpy(), target[:, k].numpy(), 1)
        assert scale[k].item() == pytest.approx(slope)
        assert shift[k].item() == pytest.approx(offset)
    exact_scale, exact_shift, _ = norm_fit(u[:, :2], 3.0 * u[:, :2] - 2.0)
    assert_close(exact_scale, torch.full((2,), 3.0, dtype=torch.float64))
    assert_close(exact_shift, torch.full((2,), -2.0, dtype=torch.float64))


@pytest.mark.parametrize("kept", [40, 64])
def test_fewer_samples_than_features(kept):
    """A pooler sees one row a sample; fp32 products of 20 rows of 64 features leave eigenvalues below zero."""
    rows = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    moment = (rows.T @ rows / 20).double()
    moment -= 3e-6 * moment.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    cut = neuron_projection(moment, torch.arange(kept))
    assert torch.equal(cut.decode[:kept], torch.eye(kept, dtype=torch.float64))
    assert cut.decode.isfinite().all()
