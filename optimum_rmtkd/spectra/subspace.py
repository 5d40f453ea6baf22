"""From moments to the subspace that is kept, with everything needed to judge it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, RMTKDError
from . import marchenko_pastur as mp
from .covariance import SecondMoments
from .edges import EDGE_ESTIMATORS, estimate_edge, estimator_options
from .laws import NoiseLaw, TimeSpectrum, spread
from .products import eigh
from .spectrum import Edge, Spectrum


__all__ = ["SignalSubspace", "check_varies", "signal_subspace", "spectrum_of"]


@dataclass(frozen=True)
class SignalSubspace:
    """Leading eigenvectors of a covariance and the diagnosis of where they were cut.

    Attributes:
        basis: (d, rank) fp64, orthonormal columns by descending eigenvalue, the largest entry of each positive.
        eigenvalues: (d,) fp64, descending, all of them.
        estimator: name of the edge estimator.
        edge: eigenvalues above are signal.
        noise_variance: per channel; NaN when the estimator has no noise model.
        rank: number of directions kept, after `min_rank` and `round_to`.
        spectral_rank: what the estimator said.
        n: number of samples seen.
        n_eff: number of samples the formulas used.
        q: channels over n_eff, null directions left out.
        null_directions: number of numerically null eigenvalues.
        variance_kept: share of the variance inside the basis.
        ks_distance: Kolmogorov-Smirnov distance between the eigenvalues below the edge and the law of noise (laws.py)
            fitted to their median, for dependent samples to their mean; NaN with fewer than two of them.
        split_half_overlap: ||U1^T U2||_F^2 / rank of the leading subspaces of two halves of the samples, in [0, 1];
            NaN when not computed.
        last_overlap: squared cosine to be expected between the last direction above the edge and the truth, under the
            spiked model; NaN without a noise model.
        ranks: spectral rank under every other estimator that applies.
        skipped: estimator -> why it does not apply.
        details: of the edge.
        times: (eigenvalues, shares) of the correlation between the samples, mean 1, where n_effective="auto" measured
            one; None otherwise.
        warnings: sentences for the user.
    """

    basis: Tensor
    eigenvalues: Tensor
    estimator: str
    edge: float
    noise_variance: float
    rank: int
    spectral_rank: int
    n: int
    n_eff: float
    q: float
    null_directions: int
    variance_kept: float
    ks_distance: float
    split_half_overlap: float
    last_overlap: float
    ranks: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    times: TimeSpectrum | None = None
    warnings: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        """Number of channels d."""
        return len(self.eigenvalues)

    @property
    def over_edge(self) -> torch.Tensor:
        """(width,) fp64 eigenvalues in units of the noise edge. Where there is no edge (a site too narrow for a bulk,
        or a rule that takes everything as signal) the mean variance stands for it, which an edge lies a little
        above."""
        return self.eigenvalues / (self.edge if self.edge > 0 else self.eigenvalues.mean())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: everything but the basis; NaN and infinities become None."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "basis"}
        values |= {"dim": self.dim, "eigenvalues": self.eigenvalues.tolist(), "warnings": list(self.warnings)}
        return _jsonable(values)


def signal_subspace(
    moments: SecondMoments,
    *,
    estimator: str = "screenot",
    n_effective: str | int = "none",
    tracy_widom_alpha: float | None = None,
    min_rank: int = 1,
    round_to: int = 1,
    compare: bool = True,
    split_half: bool | None = None,
    **options: Any,
) -> SignalSubspace:
    """Find the signal directions of accumulated moments.

    Args:
        moments: with at least 2 samples.
        estimator: a name in EDGE_ESTIMATORS.
        n_effective: what the samples are worth. "none": `moments.sample_size` independent ones; "auto": what their
            correlation in time, measured on the bulk, makes of them (laws.py); or a number of independent ones. In the
            last two cases mp_median, gavish_donoho and mp_quantile take the noise variance from the mean of what lies
            below the edge; screenot and signflip need no size and stay as they are.
        tracy_widom_alpha: level of the finite-size correction, for the estimators that have one (a warning for the
            others).
        min_rank: the rank is at least this, and at most d.
        round_to: the rank is rounded up to a multiple of this, and cut at d.
        compare: also run every other estimator.
        split_half: compute the split-half overlap (two more eigendecompositions). None: as `compare`.
        options: of the estimator, for example `tau`, `share`, `rank`, `rank_bound`.

    Raises:
        CalibrationError: fewer than 2 samples, constant or non-finite activations.
        RMTKDError: unknown estimator or option, or the estimator cannot be applied.
    """
    if min_rank < 1 or round_to < 1:
        raise RMTKDError(f"min_rank={min_rank}, round_to={round_to}: expected whole numbers of at least 1.")
    spectrum = spectrum_of(moments, n_effective)
    edge = _estimate(spectrum, estimator, tracy_widom_alpha, options)
    found = edge.rank(spectrum)
    rank = min(spectrum.dim, math.ceil(max(found, min_rank) / round_to) * round_to)
    ranks, skipped = _compare(spectrum, estimator, tracy_widom_alpha) if compare else ({}, {})
    fit = bulk_fit(spectrum, found)
    distance = math.nan if fit is None else fit.distance()
    eigenvalues = spectrum.eigenvalues
    last = math.nan
    if found and edge.noise_variance > 0:
        spike = mp.sample_to_spike(float(eigenvalues[found - 1]), spectrum.q, edge.noise_variance)
        last = mp.eigenvector_overlap(spike, spectrum.q, edge.noise_variance)
    return SignalSubspace(
        basis=spectrum.vectors[:, :rank].clone(),
        eigenvalues=eigenvalues,
        estimator=estimator,
        edge=edge.value,
        noise_variance=edge.noise_variance,
        rank=rank,
        spectral_rank=found,
        n=moments.count,
        n_eff=float(spectrum.n),
        q=spectrum.q,
        null_directions=spectrum.null_count,
        variance_kept=float(eigenvalues[:rank].sum() / eigenvalues.sum()),
        ks_distance=distance,
        split_half_overlap=_split_half_overlap(moments, rank)
        if (compare if split_half is None else split_half)
        else math.nan,
        last_overlap=last,
        ranks=ranks,
        skipped=skipped,
        details=edge.details,
        times=spectrum.times,
        warnings=_warnings(spectrum, estimator, edge, found, distance, tracy_widom_alpha),
    )


def spectrum_of(moments: SecondMoments, n_effective: str | int = "none") -> Spectrum:
    """Eigendecomposition in fp64 of the centred covariance, ready for the estimators.

    Notes:
        The covariance is a difference of sums, so an exact null direction comes out as about -1e-16 of the largest
        eigenvalue; a variance cannot be negative, and such values are set to 0.

    Raises:
        CalibrationError: fewer than 2 samples, constant or non-finite activations.
        RMTKDError: n_effective is neither "none", "auto" nor a number above 1.
    """
    covariance = moments.covariance
    _check_varies(moments, covariance.diagonal())
    values, vectors = eigh(covariance)
    _check_varies(moments, values)
    null = moments.null_covariance
    n, times = _sample_size(moments, n_effective, values, vectors)
    return Spectrum(
        eigenvalues=values,
        n=n,
        rows=moments.count,
        times=times,
        count=moments.count,
        diagonal=covariance.diagonal().clone(),
        vectors=vectors,
        null_eigenvalues=None if null is None else torch.linalg.eigvalsh(null).flip(0),
    )


def check_varies(moments: SecondMoments) -> None:
    """Refuse what has no spectrum, without computing it.

    Raises:
        CalibrationError: fewer than 2 samples, constant activations.
    """
    _check_varies(moments, moments.variance)


def _check_varies(moments: SecondMoments, variances: Tensor) -> None:
    if moments.count < 2:
        raise CalibrationError(
            f"Got {moments.count} sample(s): a covariance needs at least 2; pass more calibration data."
        )
    if bool((variances <= 0).all()):
        raise CalibrationError(
            f"The {moments.count} samples of {moments.dim} channels are all equal: no variance, no spectrum. Check "
            "that the hook sits on an activation that depends on the input."
        )


@dataclass(frozen=True)
class BulkFit:
    """The law of noise scaled to the eigenvalues beyond the signal.

    Attributes:
        eigenvalues: fp64, ascending, those taken as bulk.
        law: of noise of unit variance in as many directions.
        sigma2: scale, by their median (by their mean, for dependent samples).
        absent: share of the law that is exactly zero because there are fewer samples than directions; no such
            eigenvalue is among those above.
    """

    eigenvalues: Tensor
    law: NoiseLaw
    sigma2: float
    absent: float

    def share_below(self, x: Tensor) -> Tensor:
        """Share of the bulk that the law expects below x. Where an effective size says that there should be more
        zeros than there are, they count."""
        return (self.law.cdf(x / self.sigma2) - self.absent) / (1 - self.absent)

    def distance(self) -> float:
        """Kolmogorov-Smirnov distance between both."""
        bulk = self.eigenvalues
        fitted = self.share_below(bulk)
        steps = torch.arange(len(bulk) + 1, dtype=torch.float64, device=bulk.device) / len(bulk)
        return float(torch.maximum((fitted - steps[:-1]).abs().max(), (fitted - steps[1:]).abs().max()))


def bulk_fit(spectrum: Spectrum, rank: int) -> BulkFit | None:
    """The fit to what follows the `rank` leading eigenvalues; None with fewer than two of them."""
    bulk, law = spectrum.positive[rank:].flip(0), spectrum.law_beyond(rank)
    if len(bulk) < 2:
        return None
    if spectrum.independent:
        sigma2, absent = float(torch.quantile(bulk, 0.5)) / law.quantile(0.5), max(0.0, 1 - 1 / law.q)
    else:
        width = max(len(bulk), spectrum.width - rank)
        sigma2, absent = float(bulk.sum()) / width, max(0.0, 1 - spectrum.samples / width)
    return BulkFit(bulk, law, sigma2, absent)


def _sample_size(
    moments: SecondMoments, n_effective: str | int, values: Tensor, vectors: Tensor
) -> tuple[float, TimeSpectrum | None]:
    """(size for the formulas, correlation of the samples where it is measured)."""
    if n_effective == "none":
        return moments.sample_size, None
    if n_effective == "auto":
        times = moments.time_spectrum(values, vectors)
        if times is None:
            return moments.sample_size, None
        # Weights have a law of their own, which is not kept: then the size alone is known.
        return max(2.0, moments.sample_size / spread(times)), times if moments.sample_size == moments.count else None
    if isinstance(n_effective, (int, float)) and not isinstance(n_effective, bool) and n_effective > 1:
        return float(n_effective), None
    raise RMTKDError(f"n_effective={n_effective!r}: expected 'none', 'auto' or a number above 1.")


def _estimate(spectrum: Spectrum, name: str, alpha: float | None, options: dict[str, Any]) -> Edge:
    if alpha is not None and "tracy_widom_alpha" in estimator_options(name):
        options = {**options, "tracy_widom_alpha": alpha}
    return estimate_edge(spectrum, name, **options)


def _compare(spectrum: Spectrum, chosen: str, alpha: float | None) -> tuple[dict[str, int], dict[str, str]]:
    ranks, skipped = {}, {}
    for name in sorted(set(EDGE_ESTIMATORS) - {chosen}):
        if name == "fixed":
            skipped[name] = "the rank is the user's"
            continue
        try:
            ranks[name] = _estimate(spectrum, name, alpha, {}).rank(spectrum)
        except RMTKDError as error:
            skipped[name] = str(error)
    return ranks, skipped


def _split_half_overlap(moments: SecondMoments, rank: int) -> float:
    halves = moments.half_covariances()
    if halves is None:
        return math.nan
    first, second = (eigh(half)[1][:, :rank] for half in halves)
    return float((first.T @ second).square().sum() / rank)


def _warnings(spectrum, estimator, edge, found, distance, alpha) -> tuple[str, ...]:
    texts = []
    if spectrum.q < 0.01:
        percent = 100 * ((1 + math.sqrt(spectrum.q)) ** 2 - 1)
        texts.append(
            f"quantile rule: q = {spectrum.q:.2g}, the Marchenko-Pastur edge lies within {percent:.0f} % of sigma^2, "
            "so rules based on a quantile or the median keep the share of directions above it, whatever the spectrum"
        )
    if distance > 0.1:
        texts.append(
            f"bulk is not Marchenko-Pastur: Kolmogorov-Smirnov distance {distance:.2f} (> 0.1); the rank is a "
            "heuristic"
        )
    if found > spectrum.dim / 2:
        texts.append(
            f"more than half is signal: {found} of {spectrum.dim} directions lie above the edge; low rank plus noise "
            "fails"
        )
    if alpha is not None and "tracy_widom_alpha" not in estimator_options(estimator):
        texts.append(f"tracy_widom_alpha has no effect on {estimator}")
    if "warning" in edge.details:
        texts.append(edge.details["warning"])
    return tuple(texts)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
