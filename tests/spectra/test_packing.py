"""Symmetric sums of many channels are held as little more than their upper triangle; nothing else changes."""

from __future__ import annotations

import pytest
import torch

from optimum_rmtkd import RMTKDError
from optimum_rmtkd.spectra import SecondMoments
from optimum_rmtkd.spectra.products import diagonal_of, packed, packed_product, packed_size, unpacked


@pytest.mark.parametrize("dim", [1, 100, 511, 512, 515, 640])
def test_a_packed_matrix_comes_back(dim):
    matrix = torch.randn(dim, dim)
    matrix = matrix + matrix.T
    strips = packed(matrix)
    assert torch.equal(unpacked(strips, dim), matrix)
    assert dim < 512 or strips.numel() < 0.54 * dim * dim


@pytest.mark.parametrize("dim", [1, 511, 512, 517])
def test_a_packed_product_is_the_packed_form_of_the_product(dim):
    left = torch.randn(40, dim, dtype=torch.float64)
    scales = torch.rand(40, 1, dtype=torch.float64)
    found = packed_product(left * scales, left)
    expected = (left * scales).T @ left
    assert found.numel() == packed_size(dim)
    assert torch.allclose(found, packed(expected), atol=1e-12)
    assert torch.allclose(diagonal_of(found, dim), expected.diagonal(), atol=1e-12)


def test_gradients_of_many_channels_are_held_as_their_upper_triangle():
    moments, gradients = SecondMoments(520, halves=False), samples(20).flatten(0, 1)
    for part in gradients.split(17):
        moments.update_gradient(part)
    assert torch.allclose(moments.gradient_moment, gradients.T @ gradients / len(gradients), atol=1e-12)
    assert moments._sums["gradient"].numel() < 0.54 * 520**2


def samples(count, shift=0.0):
    generator = torch.Generator().manual_seed(int(shift))
    return torch.randn(count, 3, 520, generator=generator, dtype=torch.float64) + shift


@pytest.mark.parametrize("halves", [True, False])
def test_moments_of_many_channels(halves):
    first, second = samples(20), samples(13, 3.0)
    moments, other = (SecondMoments(520, halves=halves) for _ in range(2))
    moments.update(first)
    other.update(second)
    moments.merge(other)
    restored = SecondMoments(520, halves=halves)
    restored.load_state_dict(moments.state_dict())
    expected = torch.cat([first, second]).flatten(0, 1).T.cov(correction=0)
    for found in (moments, restored):
        assert torch.allclose(found.covariance, expected, atol=1e-10)
        assert torch.allclose(found.variance, expected.diagonal(), atol=1e-10)
    assert (moments.half_covariances() is not None) == halves


def test_moments_with_and_without_halves_are_not_added_up():
    whole, split = SecondMoments(5, halves=False), SecondMoments(5)
    x = torch.randn(40, 5, dtype=torch.float64)
    for moments in (whole, split):
        moments.update(x[:30])
        moments.update(x[30:])
    assert torch.allclose(whole.covariance, split.covariance, atol=1e-13)
    assert whole._sums["outer"].numel() == 25 and split._sums["outer"].numel() == 50
    with pytest.raises(RMTKDError, match="halves=False"):
        split.merge(whole)
    with pytest.raises(RMTKDError, match="halves=False"):
        whole.load_state_dict(split.state_dict())
