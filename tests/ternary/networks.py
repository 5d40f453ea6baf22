"""The setting of the acceptance bars: a Gaussian mixture of two classes, three ReLU layers, exact infinite-width
kernels."""

from __future__ import annotations

import math

import torch

from optimum_rmtkd.ternary.functionals import get_activation
from optimum_rmtkd.ternary.kernels import GaussianMixture, RandomLayer, dense_chain, exact_kernels


DEPTH = 3
SEEDS = range(5)


def mixture(p: int, distance: float = 4.0, spread: float = 8.0) -> GaussianMixture:
    """Centred means at 4 e1 and 4 e2, covariances I and (1 + 8 / sqrt p) I."""
    means = torch.zeros(2, p, dtype=torch.float64)
    means[0, 0] = means[1, 1] = distance
    eye = torch.eye(p, dtype=torch.float64)
    return GaussianMixture(means - means.mean(0), torch.stack((eye, (1 + spread / math.sqrt(p)) * eye)))


def samples(p: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(x, labels, tau0), centred."""
    x, labels = mixture(p).sample((n // 2, n - n // 2), seed)
    x = x - x.mean(0)
    return x, labels, float(x.square().sum(1).mean().sqrt())


def dense_layers(tau0: float, name: str = "relu", depth: int = DEPTH) -> list[RandomLayer]:
    activation = get_activation(name)
    return [RandomLayer(activation, f.mean) for f in dense_chain(activation, depth, tau0)]


def dense_kernels(x: torch.Tensor, tau0: float) -> tuple[torch.Tensor, torch.Tensor]:
    return exact_kernels(x, dense_layers(tau0))


def norm(matrix: torch.Tensor) -> float:
    """Spectral norm of a symmetric matrix."""
    return float(torch.linalg.eigvalsh(matrix).abs().max())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in spectral norm."""
    return norm(found - expected) / norm(expected)
