"""How far real features are from what the theory of wide random networks assumes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import CalibrationError


__all__ = ["FeatureDiagnostics", "diagnose", "standardizer"]

PAIRS = 2000  # samples among which cosines are taken; all pairs of more would not fit in memory
UNCENTRED = 0.05  # share of the mean squared norm above which a mean is no sampling noise
FLAT = 1e-8  # variance over the mean square below which a feature is constant


@dataclass(frozen=True)
class FeatureDiagnostics:
    """What the theory asks of the inputs, as numbers.

    Attributes:
        samples, features: n and p.
        norm_dispersion: standard deviation of ||x||^2 over its mean; O(p^-1/2) in theory.
        mean_coherence, max_coherence: of |cos(x_i, x_j)| over pairs of samples; O(p^-1/2) in theory.
        effective_rank: (sum of variances)^2 / sum of squared variances of the principal components.
        constant_features: number of features that do not vary.
        mean_share: ||mean of x||^2 over the mean of ||x||^2; 0 in theory, and after `standardizer`.
    """

    samples: int
    features: int
    norm_dispersion: float
    mean_coherence: float
    max_coherence: float
    effective_rank: float
    constant_features: int
    mean_share: float

    @property
    def ratio(self) -> float:
        """n / p."""
        return self.samples / self.features

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dictionary, n/p included."""
        return {**asdict(self), "ratio": self.ratio}

    def warnings(self) -> list[str]:
        """One sentence, with its number, for each assumption that is clearly violated."""
        found = []
        if self.mean_share > UNCENTRED:
            found.append(
                f"The features are not centred: their mean holds {self.mean_share:.0%} of the mean squared norm and "
                "adds a common mode to the kernel (see standardizer)."
            )
        if self.features < 100:
            found.append(
                f"p={self.features} features are few: the kernels agree up to about p^-1/2 = "
                f"{self.features**-0.5:.2f}."
            )
        if self.norm_dispersion > 0.5:
            found.append(
                f"Squared norms vary by {self.norm_dispersion:.2f} of their mean; the theory takes them as equal."
            )
        if self.mean_coherence > 0.25:
            found.append(
                f"Samples have a mean |cosine| of {self.mean_coherence:.2f}; the theory takes them as near orthogonal."
            )
        if self.effective_rank < 0.1 * self.features:
            found.append(
                f"The effective rank is {self.effective_rank:.1f} of {self.features} features: they are strongly "
                "correlated (standardize='feature' may help)."
            )
        if self.constant_features:
            found.append(f"{self.constant_features} of {self.features} features are constant and carry nothing.")
        return found


def check_features(x: torch.Tensor) -> None:
    """Refuse what is no matrix of features.

    Raises:
        CalibrationError: not (n, p) with n > 1, values that are not finite, or no variation at all.
    """
    if x.dim() != 2 or len(x) < 2:
        raise CalibrationError(
            f"Features of shape {tuple(x.shape)}: expected (samples, features) with two samples or more."
        )
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        raise CalibrationError(
            f"{int(bad.sum())} of {x.numel()} feature values are not finite, the first in row "
            f"{int(bad.any(1).nonzero()[0])}: expected numbers."
        )
    if float((x.double() - x.double().mean(0)).square().mean()) <= FLAT * float(x.double().square().mean()):
        raise CalibrationError(
            f"All {len(x)} samples have the same {x.shape[1]} features up to rounding: nothing can be told apart. "
            "Check what the features are taken from."
        )


def standardizer(x: torch.Tensor, how: str = "global") -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, factor), (p,) fp64 each: (x - mean) * factor is centred with mean squared norm 1.

    Args:
        x: (n, p) training features.
        how: "global": one factor for all features (the theory's). "feature": each feature gets variance 1 / p.

    Raises:
        CalibrationError: see `check_features`.
    """
    check_features(x)
    wide = x.double()
    mean = wide.mean(0)
    variance = (wide - mean).square().mean(0)
    p = x.shape[1]
    if how == "global":
        return mean, (1 / variance.sum().sqrt()).expand(p).clone()
    alive = variance > FLAT * variance.mean()
    factor = torch.zeros_like(variance)
    factor[alive] = 1 / (variance[alive] * int(alive.sum())).sqrt()
    return mean, factor


def diagnose(x: torch.Tensor) -> FeatureDiagnostics:
    """Diagnostics of standardised features.

    Args:
        x: (n, p), as the first layer sees them (`standardizer`); a shared mean would show as coherence.
    """
    check_features(x)
    wide = x.double()
    n, p = wide.shape
    squares = wide.square().sum(1)
    some = wide[torch.linspace(0, n - 1, min(n, PAIRS)).long()]
    some = some / some.norm(dim=1, keepdim=True).clamp_min(torch.finfo(some.dtype).tiny)
    cosines = (some @ some.T).abs()
    cosines.fill_diagonal_(0)
    mean = wide.mean(0)
    centred = wide - mean
    moments = centred.T @ centred if p <= n else centred @ centred.T
    variance = centred.square().mean(0)
    return FeatureDiagnostics(
        samples=n,
        features=p,
        norm_dispersion=float(squares.std() / squares.mean()),
        mean_coherence=float(cosines.sum() / (len(some) * (len(some) - 1))),
        max_coherence=float(cosines.max()),
        effective_rank=float(moments.diagonal().sum() ** 2 / moments.square().sum()),
        constant_features=int((variance <= FLAT * variance.mean()).sum()),
        mean_share=float(mean.square().sum() / squares.mean()),
    )
