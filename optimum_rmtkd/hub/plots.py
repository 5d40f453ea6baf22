"""Figures of a run, drawn by matplotlib. They take plain dictionaries, as the record of a run holds them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..pages.escaping import figure_text
from ..pages.figures import PALETTE, draw_budget, draw_spectrum, legend, new_figure, short, style
from .measures import is_number
from .run import Run


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_curves", "draw_stages", "draw_widths", "figures_of"]

GRID_COLUMNS = 4
MOST_IN_GRID = 24  # sites of one picture; the page shows all


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
    style(axes, "features")
    axes.tick_params(axis="y", labelsize=8)
    legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def draw_stages(stages: Sequence[Mapping[str, Any]], axes: Axes) -> None:
    """Size after each stage as bars; the metric as a line: of the uncut model, then just after each cut and at its
    end."""
    first = stages[0]["parameters_before"]
    sizes = [first] + [stage["parameters_after"] for stage in stages]
    axes.bar(range(len(sizes)), sizes, color=PALETTE["bulk"], width=0.6)
    axes.set_xticks(range(len(sizes)), ["uncut"] + [figure_text(f"stage {stage['index']}") for stage in stages])
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    style(axes, "", "parameters")
    points = [(0.0, stages[0].get("metric_before"))]
    for at, stage in enumerate(stages, start=1):
        points += [(at - 0.2, stage.get("metric_cut")), (at + 0.2, stage.get("metric_after"))]
    points = [point for point in points if is_number(point[1])]
    if points:
        right = axes.twinx()
        right.plot(*zip(*points, strict=True), "o-", color=PALETTE["signal"], ms=4)
        style(right, "", (stages[0].get("metric_name") or "metric").removeprefix("eval_"))
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
    style(axes, "step", "loss")
    legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


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
        figure = new_figure(7, 1.2 + 0.22 * len(widths))
        draw_widths(widths, figure.subplots())
        yield "widths", "Width of every part of the network, before and after", figure
    if run.spectra:
        sites = list(run.spectra.values())[0]["sites"][:MOST_IN_GRID]
        rows = math.ceil(len(sites) / GRID_COLUMNS)
        figure = new_figure(12, 2.3 * rows)
        grid = figure.subplots(rows, GRID_COLUMNS, squeeze=False)
        for axes in grid.flat[len(sites) :]:
            axes.axis("off")
        for axes, site in zip(grid.flat, sites, strict=False):
            draw_spectrum(site, axes, explained=False)
            style(axes, title=site["name"], size=8)
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        yield "spectra", "Eigenvalues at each site, with the Marchenko-Pastur fit and the edge", figure
    for report in list(run.spectra.values())[-1:]:
        if report["budget"]:
            figure = new_figure(6, 3.4)
            draw_budget(report, figure.subplots())
            yield "budget", "Predicted loss against size", figure
    if curve_names(run.history):
        figure = new_figure(7, 3.4)
        draw_curves(run.history, run.stages, figure.subplots())
        yield "training", "Losses during the distillation", figure
