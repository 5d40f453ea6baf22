"""Figures in the style of the house, drawn by matplotlib: of spectra and of a budget, from plain dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import check_matplotlib
from .escaping import figure_text
from .rounding import rounded, short


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
    """Histogram of a site's eigenvalues in logarithmic bins, signal and bulk apart, the fitted law and the edge.

    Heights are on a scale of square roots (a rootogram, Tukey 1977), on which counts scatter alike whether they are
    large or small: a law far narrower than the bulk stays inside, and the histogram can still be read beside it.
    """
    import numpy as np
    import torch

    values = np.array([v for v in site["eigenvalues"] if v > FLOOR * site["eigenvalues"][0]])
    rank = site["spectral_rank"]
    bins = np.geomspace(values.min() * 0.98, values.max() * 1.02, BINS + 1)
    bulk, signal = (np.histogram(part, bins)[0] for part in (values[rank:], values[:rank]))
    bars = {"width": np.diff(bins), "align": "edge", "linewidth": 0}
    axes.bar(bins[:-1], bulk, color=PALETTE["bulk"], label="bulk", **bars)
    axes.bar(bins[:-1], signal, bottom=bulk, color=PALETTE["signal"], label="above the edge", **bars)
    highest = float((bulk + signal).max())
    if law := bulk_law(site):
        half = (bins[1] / bins[0]) ** 0.5
        at = torch.tensor(np.geomspace(bins[0], bins[-1], 400))
        expected = len(law.eigenvalues) * (law.share_below(at * half) - law.share_below(at / half))
        axes.plot(at, expected.clamp_min(0), color=PALETTE["law"], lw=1.4, label="Marchenko-Pastur fit")
        highest = max(highest, float(expected.max()))
    axes.set_xscale("log")
    axes.xaxis.get_major_locator().set_params(numticks=6)
    _root_scale(axes, max(1.0, highest))
    if site.get("edge"):
        axes.axvline(site["edge"], color=PALETTE["edge"], lw=1.2, ls="--", label="edge")
    style(axes, "eigenvalue", "directions")
    if explained:
        legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _root_scale(axes: Axes, highest: float) -> None:
    """From 0 to a little above `highest`, by the square root; round numbers at even distances."""
    import numpy as np

    axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    axes.set_ylim(0, 1.12 * highest)
    ticks = [0]
    for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000):
        if ticks[-1] ** 0.5 + 0.2 * highest**0.5 <= tick**0.5 <= (1.05 * highest) ** 0.5:
            ticks.append(tick)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])


def draw_budget(report: Mapping[str, Any], axes: Axes) -> None:
    """Predicted loss against size, move by move of the allocation, and the point that was taken."""
    points = report["budget"]
    costs = [point["cost"] for point in points]
    losses = [point["predicted_loss"] for point in points]
    recipe = report["recipe"]
    target = "FLOPs" if recipe.get("target_flops") else "ms a pass" if recipe.get("target_latency") else "parameters"
    axes.plot(costs, losses, color=PALETTE["bulk"], lw=1.6)
    axes.axvline(costs[-1], color=PALETTE["signal"], lw=1, ls=":")
    axes.plot(costs[-1], losses[-1], "o", color=PALETTE["signal"], ms=6, label=f"taken: {short(costs[-1])}")
    axes.invert_xaxis()
    axes.margins(x=0.06, y=0.08)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.yaxis.set_major_formatter(lambda value, _: rounded(value) if abs(value) < 1e-3 else short(value))
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(nbins=4)
    style(axes, target, "predicted loss")
    legend(axes, loc="upper left")
