"""Autocorrelation of tokens within sequences, from lagged sums over a few fixed projections.

For a projection z of the samples about the pivot and the pairs (t, t + k) of unmasked positions of one sequence, three
sums per lag k are kept: z_t z_{t+k}, z_t + z_{t+k} and the number of pairs. They are additive over sequences, can be
moved to another pivot exactly, and give autocovariances about the mean of all samples. A mean per sequence would be
wrong here: it removes what the tokens of a sequence share, which is the very dependence to be measured.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


__all__ = ["LAGGED_SHAPES", "MAX_LAG", "PROJECTIONS", "inflation", "lagged_sums", "projections", "shift_lagged_sums"]

MAX_LAG = 32
PROJECTIONS = 8
LAGGED_SHAPES = {
    "lag_products": (MAX_LAG + 1, PROJECTIONS),
    "lag_totals": (MAX_LAG + 1, PROJECTIONS),
    "lag_pairs": (MAX_LAG + 1,),
}


@functools.lru_cache(maxsize=64)
def projections(dim: int) -> Tensor:
    """(dim, PROJECTIONS) fp64 Gaussian directions: the same in every process, so that sums can be merged."""
    generator = torch.Generator().manual_seed(1234)
    return torch.randn(dim, PROJECTIONS, generator=generator, dtype=torch.float64) / dim**0.5


def lagged_sums(x: Tensor, mask: Tensor | None, pivot: Tensor) -> dict[str, Tensor]:
    """Lagged sums of one batch.

    Args:
        x: (batch, ..., dim); the middle axes are flattened to positions.
        mask: (batch, ...) bool or None.
        pivot: (dim,) fp64.

    Returns:
        fp64 tensors of LAGGED_SHAPES.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    device = x.device if x.device.type != "mps" else torch.device("cpu")
    basis = projections(x.shape[-1]).to(x.device, work)
    z = (x.to(work) @ basis).flatten(1, -2).to(device).double() - (
        pivot.to(device) @ projections(len(pivot)).to(device)
    )
    seen = torch.ones(z.shape[:2], dtype=torch.bool, device=device) if mask is None else mask.flatten(1).to(device)
    z = torch.where(seen[..., None], z, 0.0)
    # Correlations of all lags at once; MAX_LAG zeros behind each sequence keep its end from meeting its beginning.
    size = z.shape[1] + MAX_LAG
    fz, fm = torch.fft.rfft(z, n=size, dim=1), torch.fft.rfft(seen.double(), n=size, dim=1)[..., None]
    lags = min(MAX_LAG + 1, size)

    def summed(spectrum: Tensor) -> Tensor:
        values = torch.fft.irfft(spectrum.sum(0), n=size, dim=0)[:lags]
        return torch.nn.functional.pad(values, (0, 0, 0, MAX_LAG + 1 - lags))

    pairs = summed(fm.conj() * fm)[:, 0].round()
    products = summed(fz.conj() * fz)
    totals = summed(fm.conj() * fz + fz.conj() * fm)
    empty = (pairs == 0)[:, None]
    return {
        "lag_products": products.masked_fill(empty, 0.0),
        "lag_totals": totals.masked_fill(empty, 0.0),
        "lag_pairs": pairs,
    }


def shift_lagged_sums(sums: dict[str, Tensor], delta: Tensor) -> dict[str, Tensor]:
    """The lagged sums of z + delta, delta (PROJECTIONS,), from those of z."""
    products, totals, pairs = sums["lag_products"], sums["lag_totals"], sums["lag_pairs"][:, None]
    return {
        "lag_products": products + delta * totals + pairs * delta.square(),
        "lag_totals": totals + 2 * pairs * delta,
        "lag_pairs": sums["lag_pairs"],
    }


def inflation(sums: dict[str, Tensor], mean: Tensor) -> float:
    """Variance inflation of a mean over dependent tokens, >= 1: 1 + 2 sum_k (m_k / m_0) rho_k.

    Args:
        sums: as `lagged_sums` gives them.
        mean: (PROJECTIONS,) fp64, the mean of z over all samples.

    Notes:
        m_k is the number of pairs at lag k; for full sequences of length L, m_k / m_0 = 1 - k / L, the exact
        finite-length weight, so that L identical tokens count as one. The sum stops at the first rho_k <= 0 (Geyer's
        initial positive sequence, lag by lag) and at MAX_LAG.
    """
    pairs = sums["lag_pairs"]
    if not pairs[0] > 0:
        return 1.0
    centred = sums["lag_products"] - mean * sums["lag_totals"] + pairs[:, None] * mean.square()
    covariances = centred.sum(1) / pairs.clamp_min(1)
    if not covariances[0] > 0:
        return 1.0
    rho = covariances[1:] / covariances[0]
    positive = torch.cumprod(((rho > 0) & (pairs[1:] > 0)).double(), 0)
    return float(1 + 2 * (positive * rho * pairs[1:] / pairs[0]).sum())
