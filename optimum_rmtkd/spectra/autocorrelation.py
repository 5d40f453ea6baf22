"""Correlation of tokens within sequences, measured on the bulk of the spectrum, from lagged sums.

With C_k = E[x_t x_{t+k}^T] over the pairs (t, t + k) of unmasked positions of one sequence, symmetrised, and a few
fixed random directions G (d, PROJECTIONS), three sums per lag k are kept: C_k G, the sum of x_t + x_{t+k}, and the
number of pairs, for as many lags as were seen and MAX_LAG at most. They are additive over sequences, can be moved to
another pivot exactly, and give autocovariances about the mean of all samples. A mean per sequence would be wrong here:
it removes what the tokens of a sequence share, which is the very dependence to be measured.

That one side of C_k is whole is what lets the leading eigenvectors be taken out afterwards, when they are known: the
trace of C_k over any set of directions V is the mean of g^T V V^T C_k g over Gaussian g (Hutchinson 1989).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .samples import work_dtype


__all__ = [
    "MAX_LAG",
    "PROJECTIONS",
    "added",
    "bulk_autocorrelation",
    "lagged_shapes",
    "lagged_sums",
    "longer",
    "projections",
    "shift_lagged_sums",
    "time_spectrum",
]

MAX_LAG = 32
PROJECTIONS = 16
LAGS_AT_ONCE = 8
LONGEST = 4 * MAX_LAG  # a sequence beyond has the spectrum of one of this length, as nothing is known beyond MAX_LAG


def lagged_shapes(dim: int, lags: int = 0) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the sums of lags 0 .. `lags` - 1."""
    return {"lag_products": (lags, dim, PROJECTIONS), "lag_totals": (lags, dim), "lag_pairs": (lags,)}


def longer(value: Tensor, lags: int = MAX_LAG + 1) -> Tensor:
    """`value` with zeros for lags it has not, up to `lags` along the first axis."""
    missing = lags - len(value)
    return value if missing <= 0 else torch.cat((value, value.new_zeros(missing, *value.shape[1:])))


def added(left: Tensor, right: Tensor) -> Tensor:
    """left + right of sums that may have seen different numbers of lags."""
    lags = max(len(left), len(right))
    return longer(left, lags) + longer(right, lags)


@functools.lru_cache(maxsize=64)
def projections(dim: int) -> Tensor:
    """(dim, PROJECTIONS) fp64 Gaussian directions: the same in every process, so that sums can be merged."""
    generator = torch.Generator().manual_seed(1234)
    return torch.randn(dim, PROJECTIONS, generator=generator, dtype=torch.float64) / dim**0.5


def lagged_sums(x: Tensor, mask: Tensor | None, pivot: Tensor) -> dict[str, Tensor]:
    """Lagged sums of one batch, about the pivot.

    Args:
        x: (batch, ..., dim); the middle axes are flattened to positions.
        mask: (batch, ...) bool or None.
        pivot: (dim,) fp64.

    Returns:
        fp64 tensors of `lagged_shapes` for the lags that these sequences have: the sums over pairs of
        x_t z_{t+k} + x_{t+k} z_t, z = x G, and of x_t + x_{t+k}, and the number of pairs.
    """
    work = work_dtype(x)
    x = x.flatten(1, -2)
    seen = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.flatten(1)
    centred = torch.where(seen[..., None], x.to(work) - pivot.to(x.device, work), 0.0)
    z = centred @ projections(x.shape[-1]).to(x.device, work)
    z = torch.cat((z, seen[..., None].to(work)), -1)
    lags, rows = min(MAX_LAG + 1, x.shape[1]), centred.flatten(0, 1)
    products, totals, pairs = [], [], []
    for first in range(0, lags, LAGS_AT_ONCE):
        block = range(first, min(lags, first + LAGS_AT_ONCE))
        neighbours = torch.stack([_neighbours(z, lag) for lag in block], 2)  # (batch, length, lags, projections + 1)
        pairs.append((neighbours[..., -1] * seen[..., None]).double().sum((0, 1)) / 2)
        sums = (rows.T @ neighbours.flatten(0, 1).flatten(1)).double()
        sums = sums.reshape(-1, len(block), PROJECTIONS + 1).transpose(0, 1)
        products.append(sums[..., :-1])
        totals.append(sums[..., -1])
    return {"lag_products": torch.cat(products), "lag_totals": torch.cat(totals), "lag_pairs": torch.cat(pairs)}


def _neighbours(z: Tensor, lag: int) -> Tensor:
    """z_{t + lag} + z_{t - lag}, what lies outside the sequence counting as 0."""
    if lag == 0:
        return 2 * z
    both = torch.zeros_like(z)
    both[:, :-lag] += z[:, lag:]
    both[:, lag:] += z[:, :-lag]
    return both


def shift_lagged_sums(sums: dict[str, Tensor], delta: Tensor) -> dict[str, Tensor]:
    """The lagged sums of x + delta, delta (dim,), from those of x."""
    products, totals, pairs = sums["lag_products"], sums["lag_totals"], sums["lag_pairs"]
    basis = projections(len(delta)).to(delta.device)
    moved = delta @ basis
    return {
        "lag_products": products
        + totals[:, :, None] * moved
        + delta[:, None] * (totals @ basis)[:, None, :]
        + 2 * pairs[:, None, None] * torch.outer(delta, moved),
        "lag_totals": totals + 2 * pairs[:, None] * delta,
        "lag_pairs": pairs,
    }


def bulk_autocorrelation(products: Tensor, pairs: Tensor, vectors: Tensor, rank: int) -> Tensor | None:
    """Autocorrelation rho_1, rho_2 .. of the samples in the span of all but the `rank` leading eigenvectors.

    Args:
        products: (lags, dim, PROJECTIONS) the sums of that name, about the mean.
        pairs: (lags,) number of pairs at each lag.
        vectors: (dim, m) fp64, eigenvectors of the covariance that are not null, leading ones first.
        rank: how many of them are signal.

    Returns:
        (lags - 1,) fp64, 0 where there are no pairs; None where nothing varies or no sample had neighbours.

    Notes:
        The trace of C_k over the bulk V is that of (V^T G)^T (V^T C_k G), up to what C_k G holds of the signal: the
        latter has mean 0, but a massive channel may be a million times the bulk. So combinations of G are weighed by
        the inverse of their variance, which is least for those that hardly see the signal (generalised least squares).
    """
    if not pairs[:1].sum() > 0:
        return None
    basis = projections(len(vectors)).to(vectors)
    weights = torch.linalg.pinv(basis.T @ products[0], hermitian=True)  # (projections, projections)
    probe = vectors[:, rank:] @ (vectors[:, rank:].T @ basis) @ weights
    traces = (products * probe).sum((1, 2)) / pairs.clamp_min(1)
    if not traces[0] > 0:
        return None
    return torch.where(pairs > 0, traces / traces[0], 0.0)[1:]


def time_spectrum(rho: Tensor, pairs: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(eigenvalues, shares) of the correlation matrix between all samples, mean 1.

    Args:
        rho: (lags - 1,) autocorrelation.
        pairs: (lags,) number of pairs at each lag.

    Notes:
        The matrix is made of one block (rho_|i-j|) for each sequence. How many there are of each length is the second
        difference of `pairs`; of those longer than MAX_LAG, whose number and mean length are known, the mean stands
        for all. The second moment is 1 + 2 sum_k (pairs_k / pairs_0) rho_k^2, so that L equal tokens count as one.
        Measured correlations need not belong to a positive matrix: negative eigenvalues are set to 0.
    """
    rho, pairs = longer(torch.cat((rho.new_ones(1), rho)).cpu()), longer(pairs.cpu())
    times, shares = [], []
    for length, number in _lengths(pairs):
        size = min(length, LONGEST)
        lag = torch.arange(size)
        lag = (lag[:, None] - lag[None, :]).abs()
        matrix = torch.where(lag <= MAX_LAG, rho[lag.clamp_max(MAX_LAG)], 0.0)
        times.append(torch.linalg.eigvalsh(matrix).clamp_min(0))
        shares.append(rho.new_full((size,), number * length / size))
    t, share = torch.cat(times), torch.cat(shares)
    share = share / share.sum()
    return tuple((t / (share * t).sum()).tolist()), tuple(share.tolist())


def _lengths(pairs: Tensor) -> list[tuple[int, float]]:
    """[(length, number of sequences)] behind the numbers of pairs; gaps inside a sequence blur them only."""
    beyond = pairs.diff().neg()  # [k]: sequences longer than k
    found = [(length, float(beyond[length - 1] - beyond[length])) for length in range(1, MAX_LAG)]
    rest = float(beyond[MAX_LAG - 1])
    if rest > 0:
        found.append((MAX_LAG - 1 + round(float(pairs[MAX_LAG - 1]) / rest), rest))
    return [(length, number) for length, number in found if number > 0] or [(1, 1.0)]
