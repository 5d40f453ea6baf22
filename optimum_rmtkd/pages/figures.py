"""Figures in the style of the house, drawn by matplotlib: of spectra and of a budget, from plain dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import check_matplotlib
from .escaping import figure_text


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..spectra.subspace import BulkFit

__all__ = ["PALETTE", "bulk_law", "draw_budget", "draw_spectrum", "legend", "new_figure", "short", "style"]

# Told apart by people with any kind of colour vision; the page replaces them by its own, for the light and the dark.
PALETTE = {
    "ink": "#3b3f46",
    "faint": "#b9bec7",
    "bulk": "#4c8ec4",
    "signal": "#d1731f",
    "law": "#1d7d5c",
    "edge": "#a8326e",
}
FLOOR = 1e-9  # of the largest eigenvalue: what lies below is rounding
BINS = 40


def new_figure(width: float = 4.0, height: float = 2.6) -> Figure:
    """An empty figure, so narrow that its letters can be read on a phone.

    Raises:
        RMTKDError: matplotlib (the extra `report`) is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def style(axes: Axes, x: str = "", y: str = "", title: str = "", size: int = 9) -> None:
    """Labels and lines of the house."""
    for name, spine in axes.spines.items():
        spine.set_color(PALETTE["faint"])
        spine.set_visible(name in ("left", "bottom"))
    axes.tick_params(colors=PALETTE["ink"], labelsize=size - 1, color=PALETTE["faint"], which="both")
    axes.set_xlabel(figure_text(x), color=PALETTE["ink"], fontsize=size)
    axes.set_ylabel(figure_text(y), color=PALETTE["ink"], fontsize=size)
    axes.set_title(figure_text(title), color=PALETTE["ink"], fontsize=size + 1, loc="left")


def legend(axes: Axes, size: int = 8, **options: Any) -> None:
    """Without a frame."""
    axes.legend(fontsize=size, frameon=False, labelcolor=PALETTE["ink"], **options)


def bulk_law(site: Mapping[str, Any]) -> BulkFit | None:
    """The eigenvalues of a site taken as bulk and the law fitted to them, as in `SignalSubspace.ks_distance`.

    None with fewer than two of them.
    """
    import torch

    from ..spectra import Spectrum
    from ..spectra.subspace import bulk_fit

    if not site.get("n_eff"):
        return None
    values, times = torch.tensor(site["eigenvalues"], dtype=torch.float64), site.get("times")
    samples = site.get("n", site["n_eff"])
    times = None if times is None else (tuple(times[0]), tuple(times[1]))
    return bulk_fit(Spectrum(values, site["n_eff"], count=samples, rows=samples, times=times), site["spectral_rank"])


def draw_spectrum(site: Mapping[str, Any], axes: Axes, explained: bool = True) -> None:
    """Histogram of a site's eigenvalues in logarithmic bins, signal and bulk apart, the fitted law and the edge."""
    import numpy as np
    import torch

    values = np.array([v for v in site["eigenvalues"] if v > FLOOR * site["eigenvalues"][0]])
    rank = site["spectral_rank"]
    bins = np.geomspace(values.min() * 0.98, values.max() * 1.02, BINS + 1)
    heights = [np.histogram(part, bins)[0] for part in (values[rank:], values[:rank])]
    axes.bar(bins[:-1], heights[0], np.diff(bins), align="edge", color=PALETTE["bulk"], label="bulk")
    axes.bar(
        bins[:-1],
        heights[1],
        np.diff(bins),
        bottom=heights[0],
        align="edge",
        color=PALETTE["signal"],
        label="above the edge",
    )
    if law := bulk_law(site):
        half = (bins[1] / bins[0]) ** 0.5
        at = torch.tensor(np.geomspace(bins[0], bins[-1], 400))
        expected = len(law.eigenvalues) * (law.share_below(at * half) - law.share_below(at / half))
        axes.plot(at, expected, color=PALETTE["law"], lw=1.3, label="Marchenko-Pastur fit")
    axes.set_xscale("log")
    # A law far narrower than the bulk would flatten the histogram it is compared with.
    axes.set_ylim(0, 1.25 * max(1, int((heights[0] + heights[1]).max())))
    if site.get("edge"):
        axes.axvline(site["edge"], color=PALETTE["edge"], lw=1.2, ls="--", label="edge")
    axes.yaxis.get_major_locator().set_params(integer=True)
    style(axes, "eigenvalue", "directions")
    if explained:
        legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def draw_budget(report: Mapping[str, Any], axes: Axes) -> None:
    """Predicted loss against size, move by move of the allocation, and the point that was taken."""
    points = report["budget"]
    costs = [point["cost"] for point in points]
    losses = [point["predicted_loss"] for point in points]
    axes.plot(costs, losses, color=PALETTE["bulk"], lw=1.5)
    axes.plot(costs[-1], losses[-1], "o", color=PALETTE["signal"], label=f"taken: {short(costs[-1])}")
    axes.invert_xaxis()
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    recipe = report["recipe"]
    target = "FLOPs" if recipe.get("target_flops") else "ms a pass" if recipe.get("target_latency") else "parameters"
    style(axes, target, "predicted loss")
    legend(axes)


def short(value: float) -> str:
    """1234567 as 1.23M."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"
