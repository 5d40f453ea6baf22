"""Simulated data with a known number of signal directions."""

from __future__ import annotations

import pytest
import torch


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
