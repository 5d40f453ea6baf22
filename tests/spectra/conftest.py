"""Simulated data with a known number of signal directions."""

from __future__ import annotations

import pytest
import torch


def autoregressive(batch, length, dim, phi, seed=0):
    """(batch, length, dim) fp64 of variance 1: stationary AR(phi) along the second axis, channels independent."""
    noise = torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = noise.clone()
    for t in range(1, length):
        x[:, t] = phi * x[:, t - 1] + (1 - phi**2) ** 0.5 * noise[:, t]
    return x


def with_spikes(noise, rank, spikes, phi=0.0, seed=0):
    """`noise` (batch, length, dim) and `rank` orthogonal spikes of these strengths, each AR(phi) in time."""
    generator = torch.Generator().manual_seed(1000 + seed)
    directions = torch.linalg.qr(torch.randn(noise.shape[-1], rank, generator=generator, dtype=torch.float64))[0]
    signal = autoregressive(*noise.shape[:2], rank, phi, 2000 + seed)
    return noise + (signal * torch.linspace(*spikes, rank, dtype=torch.float64).sqrt()) @ directions.T


def _spiked(n, dim=400, rank=15, spread=0.0, seed=0, spikes=(6.0, 30.0)):
    """(n, dim) fp64: `rank` orthogonal spikes in Gaussian noise of log-normal channel variances with log-sd
    `spread`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    directions = torch.linalg.qr(normal(dim, rank))[0]
    variances = torch.exp(spread * normal(dim))
    strengths = torch.linspace(*spikes, rank, dtype=torch.float64)
    noise = normal(n, dim) * (variances / variances.mean()).sqrt()
    return noise + (normal(n, rank) * strengths.sqrt()) @ directions.T


@pytest.fixture(scope="session")
def spiked():
    return _spiked
