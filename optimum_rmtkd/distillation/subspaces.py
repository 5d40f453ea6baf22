"""Low-dimensional subspaces of a teacher's features, in which RdimKD compares student and teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch

from ..errors import RMTKDError
from ..registry import Part, Registry
from ..spectra import EDGE_ESTIMATORS, SecondMoments, signal_subspace, spectrum_of
from ..spectra.edges import check_options, needs_null_moments
from ..validation import Count, Interval, Positive, Seed


__all__ = [
    "AutoencoderProjection",
    "MarchenkoPasturProjection",
    "PCAProjection",
    "RandomProjection",
    "SubspaceProjection",
    "build_projection",
    "register_projection",
]

logger = logging.getLogger(__name__)


class SubspaceProjection(Part):
    """Finds a basis K (p, d) of a subspace of p features. Fitted once, on the frozen teacher; then constant.

    To add one, subclass, name it, implement `fit`, and register it.

    Attributes:
        keeps_samples: `fit` needs the features themselves, not only their moments.
        null_moments: `fit` needs the moments of sign-flipped features.
    """

    keeps_samples: bool = False
    null_moments: bool = False

    def fit(self, moments: SecondMoments, samples: torch.Tensor | None = None) -> torch.Tensor:
        """The basis.

        Args:
            moments: of p features.
            samples: (n, p) fp32, where `keeps_samples`.

        Returns:
            (p, d) fp64, d <= p.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement fit(moments, samples).")


PROJECTIONS: Registry[SubspaceProjection] = Registry("projection")
register_projection = PROJECTIONS.register


def build_projection(given: Any) -> SubspaceProjection | None:
    """From None (no projection), an instance, a name, or {"name": ..., arguments}."""
    if given is None or isinstance(given, SubspaceProjection):
        return given
    return PROJECTIONS.build(given)


def _dimension(wanted: int | None, features: int, default: int, who: str) -> int:
    dim = default if wanted is None else wanted
    if not 1 <= dim <= features:
        raise RMTKDError(f"{who}(dim={dim}) of {features} features: expected a number from 1 to {features}.")
    return dim


def orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis (p, d) of the columns of a (p, d) matrix: QR with a positive diagonal, so it is unique."""
    q, r = torch.linalg.qr(matrix.double())
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


@register_projection
class RandomProjection(SubspaceProjection):
    """RdimKD-R: an orthonormal basis drawn uniformly (QR of a Gaussian matrix). Looks at no data.

    Args:
        dim: d; None: half of the features.
    """

    name = "random"

    def __init__(self, dim: Count | None = None, seed: Seed = 0):
        self.dim, self.seed = dim, seed

    def fit(self, moments: SecondMoments, samples: torch.Tensor | None = None) -> torch.Tensor:
        dim = _dimension(self.dim, moments.dim, max(1, moments.dim // 2), "RandomProjection")
        generator = torch.Generator().manual_seed(self.seed)
        return orthonormal(torch.randn(moments.dim, dim, generator=generator, dtype=torch.float64))


@register_projection
class PCAProjection(SubspaceProjection):
    """RdimKD-P: the leading eigenvectors of the centred covariance, in fp64.

    Args:
        dim: d; None: as many as hold the share `energy` of the variance.
    """

    name = "pca"

    def __init__(
        self,
        dim: Count | None = None,
        energy: Annotated[float, Interval(0, 1, "right", "a share of the variance")] = 0.95,
    ):
        self.dim, self.energy = dim, energy

    def fit(self, moments: SecondMoments, samples: torch.Tensor | None = None) -> torch.Tensor:
        spectrum = spectrum_of(moments)
        kept = spectrum.eigenvalues.cumsum(0) / spectrum.eigenvalues.sum()
        enough = int((kept < self.energy - 1e-12).sum()) + 1
        dim = _dimension(self.dim, moments.dim, min(enough, moments.dim), "PCAProjection")
        return spectrum.vectors[:, :dim].cpu()


@register_projection
class AutoencoderProjection(SubspaceProjection):
    """RdimKD-A: the linear encoder of an autoencoder trained to reconstruct the features, made orthonormal.

    With a linear decoder (`hidden=0`) this is principal component analysis, found slowly; with one hidden layer of
    `hidden` GELU units the decoder may bend, and the subspace is another one.

    Args:
        dim: d; None: half of the features.
        steps, learning_rate, batch: of Adam, on the calibration features in random order.
    """

    name = "autoencoder"
    keeps_samples = True

    def __init__(
        self,
        dim: Count | None = None,
        hidden: Annotated[int, Interval(0)] = 256,
        steps: Count = 500,
        learning_rate: Positive = 3e-3,
        batch: Count = 512,
        seed: Seed = 0,
    ):
        self.dim, self.hidden, self.steps = dim, hidden, steps
        self.learning_rate, self.batch, self.seed = learning_rate, batch, seed

    def fit(self, moments: SecondMoments, samples: torch.Tensor | None = None) -> torch.Tensor:
        from torch import nn

        if samples is None or not len(samples):
            raise RMTKDError("AutoencoderProjection needs the features themselves; got none.")
        features = moments.dim
        dim = _dimension(self.dim, features, max(1, features // 2), "AutoencoderProjection")
        mean = moments.mean.float().cpu()
        scale = moments.covariance.diagonal().mean().sqrt().float().cpu().clamp_min(1e-12)
        data = (samples.float().cpu() - mean) / scale
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            encoder = nn.Linear(features, dim, bias=False)
            decoder = nn.Linear(dim, features, bias=False)
            if self.hidden:
                decoder = nn.Sequential(nn.Linear(dim, self.hidden), nn.GELU(), nn.Linear(self.hidden, features))
            parameters = [*encoder.parameters(), *decoder.parameters()]
            optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
            decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
            for _ in range(self.steps):
                rows = data[torch.randint(len(data), (min(self.batch, len(data)),))]
                loss = (decoder(encoder(rows)) - rows).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
        return orthonormal(encoder.weight.detach().T)


@register_projection
class MarchenkoPasturProjection(SubspaceProjection):
    """RdimKD-M: the eigenvectors above the noise edge; the dimension is the data's.

    Warns where the law is in doubt: positions that are correlated (fewer effective samples than half of those seen),
    and whatever `signal_subspace` finds wrong with the spectrum.

    Args:
        estimator: any edge estimator of `optimum_rmtkd.spectra`.
        dim: overrides the estimated dimension.
        wiener: scale column i by sqrt(1 - sigma^2 / eigenvalue_i), the soft form of the cut; needs an estimator with a
            noise variance.
        options: of the estimator, for example {"tau": 0.5}.

    Notes:
        Median form, independent positions: sigma^2 = median(eigenvalues) / median of the unit law, edge sigma^2 (1 +
        sqrt(p / n))^2. Correlated ones: `n_effective` of `signal_subspace`.
    """

    name = "marchenko_pastur"

    def __init__(
        self,
        estimator: str = "mp_median",
        dim: Count | None = None,
        wiener: bool = False,
        n_effective: Literal["none", "auto"] | Annotated[int, Interval(1, closed="right")] = "auto",
        options: Mapping[str, Any] | None = None,
    ):
        if estimator not in tuple(EDGE_ESTIMATORS):
            raise RMTKDError(
                f"MarchenkoPasturProjection(estimator={estimator!r}): expected one of "
                f"{', '.join(sorted(EDGE_ESTIMATORS))}."
            )
        self.estimator, self.dim, self.wiener = estimator, dim, wiener
        self.n_effective, self.options = n_effective, check_options(estimator, options or {})
        self.null_moments = needs_null_moments(estimator)

    def fit(self, moments: SecondMoments, samples: torch.Tensor | None = None) -> torch.Tensor:
        found = signal_subspace(
            moments, estimator=self.estimator, n_effective=self.n_effective, compare=False, **self.options
        )
        worth = found.n_eff if self.n_effective == "auto" else moments.n_effective
        if worth < 0.5 * moments.count:
            logger.warning(
                "MarchenkoPasturProjection: %d positions are worth %.0f independent ones, they are correlated: the "
                "edge is a heuristic. Take fewer positions a sequence.",
                moments.count,
                worth,
            )
        for text in found.warnings:
            logger.warning("MarchenkoPasturProjection: %s", text)
        dim = _dimension(self.dim, moments.dim, found.rank, "MarchenkoPasturProjection")
        logger.info("%d of %d directions, edge %.3g, sigma^2 %.3g", dim, moments.dim, found.edge, found.noise_variance)
        basis = spectrum_of(moments).vectors[:, :dim].cpu()
        if not self.wiener:
            return basis
        if not found.noise_variance > 0:
            raise RMTKDError(
                f"MarchenkoPasturProjection(wiener=True, estimator={self.estimator!r}): this estimator has no noise "
                "variance; choose mp_median, mp_quantile or another with one."
            )
        shrunk = 1 - found.noise_variance / found.eigenvalues[:dim].cpu()
        return basis * shrunk.clamp_min(0).sqrt()
