"""Edge estimators: where the noise bulk ends. One function each, in one registry."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from ..errors import RMTKDError
from ..validation import Count, Interval, Share, check_arguments, checked
from ..validation.wording import close
from . import marchenko_pastur as mp
from .spectrum import Edge, Spectrum, noise_below, settled_noise


__all__ = ["EDGE_ESTIMATORS", "Edge", "Spectrum", "estimate_edge", "register_edge_estimator"]

DEFLATION_ALPHA = 1e-3
RUNAWAY_ROUNDS = 4  # shadowed spikes show in two or three


EDGE_ESTIMATORS: dict[str, Callable[..., Edge]] = {}
NEED_NULL_MOMENTS: set[str] = set()
CONTROLS: set[str] = set()


def register_edge_estimator(
    name: str, null_moments: bool = False, control: bool = False
) -> Callable[[Callable[..., Edge]], Callable[..., Edge]]:
    """Register an edge estimator under a name that `signal_subspace(estimator=...)` and the recipe accept.

    Write a pure function from a `Spectrum` to an `Edge`; its keyword arguments after the spectrum are its options:

        @register_edge_estimator("kaiser")
        def kaiser(spectrum: Spectrum, factor: float = 1.0) -> Edge:
            mean = float(spectrum.positive.mean())
            return Edge(factor * mean, mean)

    Use `spectrum.positive`, not `spectrum.eigenvalues`, for anything like a median: it is free of numerically null
    directions. An option called `tracy_widom_alpha` receives the user's setting of that name. Where something is
    missing (too few eigenvalues, no null moments) raise RMTKDError saying what to do; comparisons then show it as a
    reason.

    Args:
        null_moments: it looks at `spectrum.null_eigenvalues`, which cost a second product a batch to collect.
        control: it has no model of noise, so its answer says nothing of where the noise ends.

    Raises:
        RMTKDError: the name is taken.
    """

    def register(function: Callable[..., Edge]) -> Callable[..., Edge]:
        if name in EDGE_ESTIMATORS:
            raise RMTKDError(f"Edge estimator {name!r} is already registered; choose another name.")
        EDGE_ESTIMATORS[name] = checked(function)
        if null_moments:
            NEED_NULL_MOMENTS.add(name)
        if control:
            CONTROLS.add(name)
        return EDGE_ESTIMATORS[name]

    return register


def find_estimator(name: str) -> Callable[..., Edge]:
    """The registered function. Raises RMTKDError listing the known names."""
    if name not in EDGE_ESTIMATORS:
        raise RMTKDError(f"Unknown edge estimator {name!r}. Known: {', '.join(sorted(EDGE_ESTIMATORS))}.")
    return EDGE_ESTIMATORS[name]


def needs_null_moments(name: str) -> bool:
    """Whether an estimator looks at the moments of sign-flipped samples."""
    return name in NEED_NULL_MOMENTS


def is_control(name: str) -> bool:
    """Whether an estimator has no model of noise."""
    return name in CONTROLS


def estimator_options(name: str) -> list[str]:
    """Names of the options that an estimator takes."""
    return list(inspect.signature(find_estimator(name)).parameters)[1:]


def estimate_edge(spectrum: Spectrum, estimator: str = "screenot", **options: Any) -> Edge:
    """Run one registered estimator.

    Raises:
        RMTKDError: unknown estimator or option, one that is missing, or the estimator cannot be applied to this
            spectrum.
    """
    return find_estimator(estimator)(spectrum, **check_options(estimator, options))


def check_options(estimator: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a registered estimator, checked and normalised by its annotations.

    Raises:
        RMTKDError: unknown estimator or option, one that is missing, or a value that does not fit.
    """
    function, known = find_estimator(estimator), estimator_options(estimator)
    if unknown := [name for name in options if name not in known]:
        meant = close(unknown[0], known)
        raise RMTKDError(
            f"Unknown option(s) {', '.join(map(str, unknown))} of edge estimator {estimator!r}. It takes: "
            f"{', '.join(known) or 'none'}.{' ' * bool(meant)}{meant}"
        )
    parameters = inspect.signature(function).parameters
    missing = [name for name in known if name not in options and parameters[name].default is inspect.Parameter.empty]
    if missing:
        raise RMTKDError(
            f"Edge estimator {estimator!r} needs the option(s) {', '.join(missing)}; got none. Pass them."
        )
    return check_arguments(function, options)


def _bulk_edge(spectrum: Spectrum, sigma2: float, alpha: float | None) -> float:
    if alpha is None:
        return sigma2 * spectrum.law.edges()[1]
    return sigma2 * spectrum.law.tracy_widom_edge(spectrum.width, alpha)


def _level(spectrum: Spectrum, least: float) -> float:
    """Noise variance of dependent samples: the mean of what lies below the edge, and not below `least`."""
    return max(least, settled_noise(spectrum, spectrum.law.edges()[1]))


@register_edge_estimator("mp_quantile")
def mp_quantile(
    spectrum: Spectrum, tau: Share = 0.5, refine: bool = True, tracy_widom_alpha: Share | None = None
) -> Edge:
    """The RMT-KD paper's rule: sigma2 = tau-quantile of the eigenvalues, refined; edge sigma2 (1 + sqrt q)^2.

    Args:
        tau: quantile in (0, 1).
        refine: fit sigma2 by least squares between histogram and Marchenko-Pastur density on [lambda-, lambda+].

    Notes:
        arXiv 2509.15724, section 3. The fit is made in units of sigma2 (in units of the eigenvalues a larger sigma2
        always fits better, the integral being proportional to 1 / sigma2) and searches within the Marchenko-Pastur
        band around the quantile: with q near 0 the band closes and the rule is the quantile itself.

    """
    start = float(torch.quantile(spectrum.positive, tau))
    sigma2 = start
    if refine:
        sigma2 = _histogram_fit(spectrum, start, tau) if spectrum.independent else _level(spectrum, start)
    details = {"tau": tau, "sigma2_quantile": start}
    return Edge(_bulk_edge(spectrum, sigma2, tracy_widom_alpha), sigma2, details)


def _histogram_fit(spectrum: Spectrum, start: float, tau: float, grid: int = 201) -> float:
    """sigma2 = `start` / x by least squares, x between the tau-quantile of the unit law and its upper edge: of signal
    and noise together the tau-quantile is one of the noise at tau or above (half of it is allowed, for few channels).
    """
    law, ascending = spectrum.law, spectrum.positive.flip(0).contiguous()
    low, high = law.edges()
    first, last = 1 / high, 1 / max(low, law.quantile(tau) / 2)
    bins = max(8, min(64, round(2 * len(ascending) ** (1 / 3))))
    nodes = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    # The law of the non-zero eigenvalues: for q > 1 the atom is not in `ascending`.
    masses = law.cdf(nodes).diff() * max(1.0, law.q)
    for _ in range(2):  # the second time around the best of the first
        factors = torch.logspace(math.log10(first), math.log10(last), grid, dtype=torch.float64)
        position = torch.searchsorted(ascending, start * factors[:, None] * nodes.to(ascending)[None, :])
        shares = position.diff(dim=1) / len(ascending)
        best = int((shares - masses).square().sum(1).argmin())
        first, last = float(factors[max(0, best - 1)]), float(factors[min(grid - 1, best + 1)])
    return start * float(factors[best])


def _median_level(spectrum: Spectrum) -> float:
    middle = float(torch.quantile(spectrum.positive, 0.5))
    return middle / spectrum.law.quantile(0.5) if spectrum.independent else _level(spectrum, middle)


@register_edge_estimator("mp_median")
def mp_median(spectrum: Spectrum, tracy_widom_alpha: Share | None = None) -> Edge:
    """sigma2 = median / mu_q, edge sigma2 (1 + sqrt q)^2. Right for white noise; keeps more as n grows otherwise.

    Of dependent samples (`n_effective`) the median lies elsewhere, below the mean in any case: sigma2 is then the mean
    of what lies below the edge, or the median where that is more, and the edge that of their law (laws.py).
    """
    sigma2 = _median_level(spectrum)
    return Edge(_bulk_edge(spectrum, sigma2, tracy_widom_alpha), sigma2)


@register_edge_estimator("gavish_donoho")
def gavish_donoho(spectrum: Spectrum) -> Edge:
    """Optimal hard threshold for white noise, its variance from the median (Gavish, Donoho 2014): omega(beta)^2 times
    the median eigenvalue. Of dependent samples: as in `mp_median`, with the optimal threshold for their law."""
    sigma2, coefficient = _median_level(spectrum), spectrum.law.hard_threshold()
    return Edge(coefficient * sigma2, sigma2, {"threshold": coefficient})


@register_edge_estimator("signflip", null_moments=True)
def signflip(spectrum: Spectrum) -> Edge:
    """Largest eigenvalue of the covariance of randomly sign-flipped samples (Hong, Sheng, Dobriban 2020).

    Raises:
        RMTKDError: no null moments.
    """
    if spectrum.null_eigenvalues is None:
        raise RMTKDError(
            "signflip needs the moments of sign-flipped samples: accumulate with SecondMoments(dim, "
            "null_moments=True)."
        )
    edge = float(spectrum.null_eigenvalues.max())
    return Edge(edge, noise_below(spectrum, edge))


@register_edge_estimator("dpa")
def dpa(spectrum: Spectrum, deflate: bool = True, tracy_widom_alpha: Share | None = None) -> Edge:
    """Deterministic parallel analysis: edge of the generalised Marchenko-Pastur law of the channel variances.

    Args:
        deflate: take out the components above the edge and start again until nothing new appears. Strong spikes
            inflate the channel variances and would otherwise hide weaker ones (shadowing).

    Notes:
        Dobriban, Owen, "Deterministic parallel analysis", JRSS-B 81 (2019). The edge is the minimum over w in (0, 1 /
        max t) of 1/w + q mean(t / (1 - w t)), t the channel variances. Tracy-Widom scale: El Karoui 2007. What is
        taken out of a component is its signal variance 1 / D(lam), D(lam) = lam m (q m + (1 - q) / lam), m = mean of 1
        / (lam - lam_j) over the eigenvalues below the edge (Benaych-Georges, Nadakuditi 2012). Taking out lam itself
        would remove noise as well, lower the edge, and run away: measured, 400 of 400 directions of white noise with
        15 spikes.

        Variance confined to one channel is noise to this rule and to signflip: a single massive channel lifts the edge
        above everything. Where the noise is correlated between channels or tokens, or of heavy tails, deflation creeps
        on, a few directions a round, until little is left. Measured, 15 spikes in 400 channels: 1 round and 15 or 16
        directions in white noise and in noise of one variance a channel, 5 to 11 rounds and 68 to 183 directions in
        correlated noise (AR(0.6) channels, AR(0.8) tokens) and multivariate t3, where the rule without deflation
        finds 15 to 40. So if it goes on for more than RUNAWAY_ROUNDS and more than doubles the rank, the edge without
        deflation is returned, with a warning. Prefer screenot on such activations.

        Of dependent samples (`n_effective`) the edge is that of n_eff, times what their law adds to it for channels of
        equal variance (laws.py).

    Raises:
        RMTKDError: no diagonal, or no eigenvectors to deflate with.
    """
    if spectrum.diagonal is None or (deflate and spectrum.vectors is None):
        raise RMTKDError("dpa needs Spectrum.diagonal, and Spectrum.vectors to deflate; got none.")
    variances, kept, rounds = _deflated(spectrum) if deflate else (spectrum.diagonal, 0, 0)
    edge = _channel_edge(spectrum, variances, tracy_widom_alpha)
    undeflated = _channel_edge(spectrum, spectrum.diagonal, tracy_widom_alpha)
    rank, plain = (int((spectrum.positive > value).sum()) for value in (edge, undeflated))
    details: dict[str, Any] = {"rounds": rounds, "deflated": kept, "rank_undeflated": plain}
    if rounds > RUNAWAY_ROUNDS and rank > 2 * plain:
        details["warning"] = (
            f"dpa's deflation runs away ({rank} of {spectrum.dim} directions after {rounds} rounds, {plain} without): "
            "the noise is correlated or of heavy tails; the edge without deflation is used, and screenot suits better"
        )
        return Edge(undeflated, noise_below(spectrum, undeflated), details)
    return Edge(edge, float(variances.sum()) / max(1, spectrum.width), details)


def _deflated(spectrum: Spectrum) -> tuple[Tensor, int, int]:
    """(channel variances (d,) of the noise, components taken out, rounds that took it)."""
    variances, kept, rounds = spectrum.diagonal, 0, 0
    while True:
        # What is taken out must be beyond doubt: one noise direction taken out by mistake lowers the edge onto the
        # next.
        sure = int((spectrum.positive > _channel_edge(spectrum, variances, DEFLATION_ALPHA)).sum())
        if sure <= kept:
            return variances, kept, rounds
        kept, rounds = sure, rounds + 1
        removed = spectrum.vectors[:, :kept].square() @ _spike_strengths(spectrum, kept)
        variances = (spectrum.diagonal - removed).clamp_min(0)


def _channel_edge(spectrum: Spectrum, variances: Tensor, alpha: float | None) -> float:
    beyond = spectrum.law.edges()[1] / mp.edges(spectrum.q)[1]  # 1 for independent samples
    return beyond * _generalised_edge(variances, spectrum.n, alpha)


def _spike_strengths(spectrum: Spectrum, kept: int) -> Tensor:
    """Signal variance (kept,) behind each of the leading eigenvalues, from those that follow, null ones included."""
    spikes, bulk = spectrum.positive[:kept], spectrum.positive[kept:]
    if not len(bulk):
        return spikes
    width = spectrum.width - kept
    ratio = width / spectrum.samples
    # 1 / (lam - lam_j) has no pole: the last spike lies above the edge and the bulk at or below it.
    mean = ((1 / (spikes[:, None] - bulk[None, :])).sum(1) + (width - len(bulk)) / spikes) / width
    return torch.minimum(spikes, 1 / (spikes * mean * (ratio * mean + (1 - ratio) / spikes)))


def _generalised_edge(variances: Tensor, n: float, alpha: float | None) -> float:
    if not variances.max() > 0:
        return 0.0  # deflation took everything: no noise is left to have an edge
    t, ratio = variances / variances.max(), len(variances) / n

    def slope(w: float) -> float:
        return ratio * float((t * w / (1 - t * w)).square().mean()) - 1

    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    w = low
    edge = 1 / w + ratio * float((t / (1 - t * w)).mean())
    if alpha is not None:
        cube = (1 + ratio * float((t * w / (1 - t * w)).pow(3).mean())) / w**3
        edge += cube ** (1 / 3) * n ** (-2 / 3) * mp.tracy_widom_quantile(1 - alpha)
    return edge * float(variances.max())


@register_edge_estimator("screenot")
def screenot(spectrum: Spectrum, rank_bound: Count | None = None) -> Edge:
    """Optimal hard threshold for low rank plus noise of unknown, possibly correlated, spectrum.

    Args:
        rank_bound: upper bound on the number of signal directions. None: a sweep over d/16, d/8, d/4. The answer is
            that of the smallest bound which no larger bound contradicts (by finding more than it allows); a warning is
            attached when the rank moves by more than 20 % of it over the bounds that hold.

    Notes:
        Donoho, Gavish, Romanov, "ScreeNOT: exact MSE-optimal singular value thresholding in correlated noise", Ann.
        Statist. 51 (2023). The top k singular values are replaced by an imputed edge, and the threshold y solves y
        D'(y) / D(y) = -4 with D(y) = phi (g phi + (1 - g) / y), phi = mean(y / (y^2 - z^2)), g = min(n/d, d/n).

    Raises:
        RMTKDError: fewer than 4 non-null eigenvalues, or 2 rank_bound + 1 not below their number.
    """
    values = spectrum.positive.sqrt()
    ratio = spectrum.width / spectrum.samples  # of the matrix itself: dependence is part of its noise
    aspect = min(ratio, 1 / ratio)
    limit = (len(values) - 2) // 2
    if limit < 1:
        raise RMTKDError(
            f"screenot on {len(values)} non-null eigenvalues: expected at least 4, of which some are noise; give more "
            "samples (calibration_samples), or another estimator."
        )
    if rank_bound is not None and not 1 <= rank_bound <= limit:
        raise RMTKDError(
            f"screenot with rank_bound={rank_bound} on {len(values)} non-null eigenvalues: expected 1 <= rank_bound "
            f"<= {limit}; give more samples or another estimator."
        )
    wanted = [spectrum.dim // 16, spectrum.dim // 8, spectrum.dim // 4] if rank_bound is None else [rank_bound]
    bounds = sorted({max(1, min(k, limit)) for k in wanted})
    edges = [_screenot_threshold(_impute(values, bound), aspect) ** 2 for bound in bounds]
    ranks = [int((spectrum.positive > edge).sum()) for edge in edges]
    # A bound that a larger bound's answer exceeds was no upper bound; of the others the smallest leaves the most bulk
    # as it is.
    chosen = next(i for i in range(len(bounds)) if i == len(bounds) - 1 or max(ranks[i + 1 :]) <= bounds[i])
    valid = ranks[chosen:] if chosen < len(bounds) - 1 else ranks
    moved = (max(valid) - min(valid)) / max(1, ranks[chosen])
    details: dict[str, Any] = {"rank_bounds": bounds, "ranks": ranks, "spread": moved}
    if moved > 0.2:
        details["warning"] = (
            f"no separated bulk: the rank is a budget, not a finding (screenot answers {ranks} for rank bounds "
            f"{bounds})"
        )
    return Edge(edges[chosen], noise_below(spectrum, edges[chosen]), details)


def _impute(values: Tensor, k: int) -> Tensor:
    """Replace the k largest of the descending `values` by a square-root edge continuing the next k."""
    steps = torch.arange(k, dtype=torch.float64, device=values.device) / k
    rise = (1 - steps.pow(2 / 3)) / (2 ** (2 / 3) - 1)
    return torch.cat([values[k] + rise * (values[k] - values[2 * k]), values[k:]])


def _screenot_threshold(noise: Tensor, aspect: float) -> float:
    """Root of y D'(y) / D(y) = -4 above the largest noise singular value; the left side is increasing."""
    top = float(noise.max())
    squares = (noise / top).square()

    def steepness(y: float) -> float:
        gap = y * y - squares
        phi = float((y / gap).mean())
        slope = -float(((y * y + squares) / gap.square()).mean())
        mixed = aspect * phi + (1 - aspect) / y
        return y * (slope / phi + (aspect * slope - (1 - aspect) / y**2) / mixed)

    low, high = 1.0, 2.0
    while steepness(high) < -4:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if steepness(middle) < -4 else (low, middle)
    return top * (low + high) / 2


@register_edge_estimator("energy", control=True)
def energy(
    spectrum: Spectrum, share: Annotated[float, Interval(0, 1, "right", "a share of the variance")] = 0.95
) -> Edge:
    """Control without a noise model: the fewest directions that hold `share` of the variance.

    Raises:
        RMTKDError: share outside (0, 1].
    """
    kept = torch.cumsum(spectrum.positive, 0) / spectrum.positive.sum()
    # At share = 1 rounding may leave the last sum a hair below 1.
    rank = min(len(kept), int((kept < share * (1 - 1e-12)).sum()) + 1)
    return _fixed_edge(spectrum, rank, {"share": share})


@register_edge_estimator("fixed", control=True)
def fixed(spectrum: Spectrum, rank: Count) -> Edge:
    """Control without a noise model: the `rank` largest directions.

    Raises:
        RMTKDError: rank outside [1, d].
    """
    if not 1 <= rank <= spectrum.dim:
        raise RMTKDError(f"rank={rank}: expected a number in [1, {spectrum.dim}], the number of channels.")
    return _fixed_edge(spectrum, rank, {})


def _fixed_edge(spectrum: Spectrum, rank: int, details: dict[str, Any]) -> Edge:
    value = float(spectrum.eigenvalues[rank]) if rank < spectrum.dim else 0.0
    return Edge(value, math.nan, {**details, "rank": rank})
