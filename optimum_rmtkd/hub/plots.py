"""Figures of a run, drawn by matplotlib. They take plain dictionaries, as the record of a run holds them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import check_matplotlib
from .escaping import figure_text
from .measures import is_number
from .run import Run


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..spectra.subspace import BulkFit

__all__ = [
    "PALETTE",
    "bulk_law",
    "draw_budget",
    "draw_curves",
    "draw_spectrum",
    "draw_stages",
    "draw_widths",
    "figures_of",
]

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
GRID_COLUMNS = 4
MOST_IN_GRID = 24  # sites of one picture; the page shows all


def _figure(width: float, height: float) -> Figure:
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _style(axes: Axes, x: str = "", y: str = "", title: str = "", size: int = 9) -> None:
    for name, spine in axes.spines.items():
        spine.set_color(PALETTE["faint"])
        spine.set_visible(name in ("left", "bottom"))
    axes.tick_params(colors=PALETTE["ink"], labelsize=size - 1, color=PALETTE["faint"], which="both")
    axes.set_xlabel(figure_text(x), color=PALETTE["ink"], fontsize=size)
    axes.set_ylabel(figure_text(y), color=PALETTE["ink"], fontsize=size)
    axes.set_title(figure_text(title), color=PALETTE["ink"], fontsize=size + 1, loc="left")


def _legend(axes: Axes, size: int = 8, **options: Any) -> None:
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


def draw_spectrum(site: Mapping[str, Any], axes: Axes, legend: bool = True) -> None:
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
    _style(axes, "eigenvalue", "directions")
    if legend:
        _legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def draw_budget(report: Mapping[str, Any], axes: Axes) -> None:
    """Predicted loss against size, move by move of the allocation, and the point that was taken."""
    points = report["budget"]
    costs = [point["cost"] for point in points]
    losses = [point["predicted_loss"] for point in points]
    axes.plot(costs, losses, color=PALETTE["bulk"], lw=1.5)
    axes.plot(costs[-1], losses[-1], "o", color=PALETTE["signal"], label=f"taken: {_short(costs[-1])}")
    axes.invert_xaxis()
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    recipe = report["recipe"]
    target = "FLOPs" if recipe.get("target_flops") else "ms a pass" if recipe.get("target_latency") else "parameters"
    _style(axes, target, "predicted loss")
    _legend(axes)


def draw_widths(before: Mapping[str, Mapping[str, Any]], axes: Axes) -> None:
    """Width of every site before and after.

    Args:
        before: {site: {"width_before", "width_after"}}, in the order of the network.
    """
    names = list(before)
    places = range(len(names))
    old = [before[name]["width_before"] for name in names]
    new = [before[name]["width_after"] for name in names]
    axes.barh(places, old, color=PALETTE["faint"], height=0.8, label="before")
    axes.barh(places, new, color=PALETTE["bulk"], height=0.8, label="after")
    for place, (a, b) in enumerate(zip(old, new, strict=True)):
        axes.text(a, place, f" {a} → {b}", va="center", fontsize=8, color=PALETTE["ink"])
    axes.set_yticks(places, [figure_text(name) for name in names])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, 1.45 * max(old))
    _style(axes, "features")
    axes.tick_params(axis="y", labelsize=8)
    _legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def draw_stages(stages: Sequence[Mapping[str, Any]], axes: Axes) -> None:
    """Size after each stage as bars; the metric as a line: of the uncut model, then just after each cut and at its
    end."""
    first = stages[0]["parameters_before"]
    sizes = [first] + [stage["parameters_after"] for stage in stages]
    axes.bar(range(len(sizes)), sizes, color=PALETTE["bulk"], width=0.6)
    axes.set_xticks(range(len(sizes)), ["uncut"] + [figure_text(f"stage {stage['index']}") for stage in stages])
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    _style(axes, "", "parameters")
    points = [(0.0, stages[0].get("metric_before"))]
    for at, stage in enumerate(stages, start=1):
        points += [(at - 0.2, stage.get("metric_cut")), (at + 0.2, stage.get("metric_after"))]
    points = [point for point in points if is_number(point[1])]
    if points:
        right = axes.twinx()
        right.plot(*zip(*points, strict=True), "o-", color=PALETTE["signal"], ms=4)
        _style(right, "", stages[0].get("metric_name") or "metric")
        right.spines["right"].set_visible(True)


def draw_curves(history: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]], axes: Axes) -> None:
    """Losses over training steps; dashed lines where the model was cut."""
    colours = itertools.cycle([PALETTE[name] for name in ("bulk", "signal", "law", "edge", "ink")])
    for key, colour in zip(curve_names(history), colours, strict=False):
        points = [(line["step"], line[key]) for line in history if _is_point(line, key)]
        mark = "." if len(points) < 30 else ""
        axes.plot(*zip(*points, strict=True), color=colour, lw=1.3, marker=mark, label=figure_text(key))
    for stage in stages:
        axes.axvline(stage["step"], color=PALETTE["faint"], lw=1, ls="--")
    _style(axes, "step", "loss")
    _legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def curve_names(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of the log that are losses over steps: the total, each term, and the evaluation's."""
    names = dict.fromkeys(key for line in history for key in line)
    wanted = [name for name in names if name in ("loss", "eval_loss") or name.startswith("loss/")]
    return [name for name in wanted if any(_is_point(line, name) for line in history)]


def _is_point(line: Mapping[str, Any], name: str) -> bool:
    return is_number(line.get(name)) and is_number(line.get("step"))


def widths_of(run: Run) -> dict[str, dict[str, int]]:
    """{site: width before the first cut and after the last}, over all stages that stand."""
    widths: dict[str, dict[str, int]] = {}
    for stage in run.stages:
        if stage["status"] in ("open", "accepted"):
            for site in stage["sites"]:
                known = widths.setdefault(site["name"], {"width_before": site["width_before"]})
                known["width_after"] = site["width_after"]
    return widths


FIGURE_NAMES = ("widths", "spectra", "budget", "training")


def figures_of(run: Run) -> Iterator[tuple[str, str, Figure]]:
    """(one of `FIGURE_NAMES`, description, figure) of the pictures that go with a card."""
    if widths := widths_of(run):
        figure = _figure(7, 1.2 + 0.22 * len(widths))
        draw_widths(widths, figure.subplots())
        yield "widths", "Width of every part of the network, before and after", figure
    if run.spectra:
        sites = list(run.spectra.values())[0]["sites"][:MOST_IN_GRID]
        rows = math.ceil(len(sites) / GRID_COLUMNS)
        figure = _figure(12, 2.3 * rows)
        grid = figure.subplots(rows, GRID_COLUMNS, squeeze=False)
        for axes in grid.flat[len(sites) :]:
            axes.axis("off")
        for axes, site in zip(grid.flat, sites, strict=False):
            draw_spectrum(site, axes, legend=False)
            _style(axes, title=site["name"], size=8)
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        yield "spectra", "Eigenvalues at each site, with the Marchenko-Pastur fit and the edge", figure
    for report in list(run.spectra.values())[-1:]:
        if report["budget"]:
            figure = _figure(6, 3.4)
            draw_budget(report, figure.subplots())
            yield "budget", "Predicted loss against size", figure
    if curve_names(run.history):
        figure = _figure(7, 3.4)
        draw_curves(run.history, run.stages, figure.subplots())
        yield "training", "Losses during the distillation", figure


def new_figure(width: float = 4.0, height: float = 2.6) -> Figure:
    """An empty figure of the house's style, so narrow that its letters can be read on a phone.

    Raises:
        RMTKDError: matplotlib (the extra `report`) is not installed.
    """
    return _figure(width, height)


def _short(value: float) -> str:
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"
