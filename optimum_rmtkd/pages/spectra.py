"""The page about spectra and a plan: a model that is not cut yet, or one stage of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .figures import draw_budget, draw_spectrum, new_figure
from .html import bars, picture, render, table, tile
from .rounding import counted, rounded, share
from .widths import width_map


__all__ = ["budget_sections", "map_section", "size_tile", "spectra_page", "spectra_sections"]

LEGEND = (("bulk", "bulk"), ("signal", "above the edge"), ("law", "Marchenko-Pastur fit"), ("edge", "edge"))
READING = (
    "How many directions have an eigenvalue of about this size. Heights are on a scale of square roots, on which a "
    "fitted law that is far narrower than the bulk stays in the picture; where it is so, the bulk is no plain noise."
)

SITE_COLUMNS = (
    ("site", "place of the network"),
    ("kind", "kind of site"),
    ("width", "features before the cut"),
    ("planned", "features the recipe leaves"),
)
SPECTRUM_COLUMNS = (
    ("n", "samples"),
    ("n_eff", "samples the formulas use"),
    ("q", "channels over samples"),
    ("edge", "eigenvalues above are signal"),
    ("variance_kept", "share of the variance above the edge"),
    ("ks_distance", "distance between bulk and Marchenko-Pastur fit"),
)


def spectra_page(report: Mapping[str, Any]) -> str:
    """HTML of one `SpectralReport.to_dict()`, signed: spectra and plan, nothing cut yet."""
    sections = []
    if report.get("note"):
        sections.append({"title": "No target", "paragraphs": report["note"].split("\n")})
    widths = [(site["name"], site["width"], site["planned"]) for site in report["sites"]]
    sections.append(map_section("Planned widths", widths))
    sections += [*budget_sections([("", report)]), *spectra_sections(report, "", "s")]
    return render("Spectra and plan", [("state", "nothing is cut yet")], sections, report["recipe"], _tiles(report))


def _tiles(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    before, after = report["parameters"], report["planned_parameters"]
    found = [size_tile("Planned size", (before, after))]
    if report["budget"] and math.isfinite(loss := report["budget"][-1]["predicted_loss"] or 0.0):
        notes = ["added to the loss by the cut, before any training", "as the gradients on the data predict it"]
        found.append(tile("Predicted price", rounded(loss), notes=notes))
    ranks, width = (sum(site[key] for site in report["sites"]) for key in ("spectral_rank", "width"))
    estimator = report["recipe"]["edge_estimator"]
    notes = [f"{ranks:,} of {width:,} directions of all sites", f"stand above the edge of the noise ({estimator})"]
    found.append(tile("Signal", share(ranks / width if width else 0.0, 0), notes=notes))
    return found


def size_tile(label: str, parameters: tuple[int, int], notes: Sequence[str] = ()) -> dict[str, Any]:
    """The tile of a number of parameters before and after."""
    before, after = parameters
    removed = 1 - after / before if before else 0.0
    value = "unchanged" if before == after else f"{share(abs(removed))} {'smaller' if removed > 0 else 'larger'}"
    texts = tuple(f"{counted(count)} parameters" for count in parameters)
    return tile(label, value, bars(before, after, texts), notes)


def map_section(title: str, sites: Sequence[tuple[str, int, int]]) -> dict[str, Any]:
    """The section of the widths before and after of (name, before, after)."""
    drawn = width_map(sites)
    return {"title": title, "map": drawn, "legend": [("bulk", "kept"), ("faint", "removed")]}


def budget_sections(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The section of the budget curves of (what is said of it, `SpectralReport.to_dict()`), a single one beside
    the section before; none where the edge decided."""
    figures = []
    for number, (said, report) in enumerate(reports):
        if report["budget"]:
            figure = new_figure(height=2.9)
            draw_budget(report, figure.subplots())
            text = f"{said}Each point is a move of the allocation, from the uncut model on; the dot is what was taken."
            text += f" Widths are {report['steps']}." if report.get("steps") else ""
            figures.append(picture(figure, f"budget-{number}", text))
    return [{"title": "Budget", "figures": figures, "side": len(figures) == 1}] if figures else []


def spectra_sections(report: Mapping[str, Any], prefix: str, key: str) -> list[dict[str, Any]]:
    """Sections of the spectra of one `SpectralReport.to_dict()`: a table, and a picture a site.

    Args:
        prefix: of their titles. key: of the ids of their figures.
    """
    sites = report["sites"]
    chosen = report["recipe"]["edge_estimator"]
    others = sorted({name for site in sites for name in site["ranks"]} - {chosen})
    ranks = [(f"rank: {name}", "directions above the edge of this estimator") for name in (chosen, *others)]
    columns = (*SITE_COLUMNS, *ranks, *SPECTRUM_COLUMNS)
    head, notes = [name for name, _ in columns], [text for _, text in columns]
    rows = []
    for site in sites:
        values = [site[name] for name in ("name", "kind", "width", "planned", "spectral_rank")]
        values += [site["ranks"].get(name) for name in others]
        rows.append([*values, *[site.get(name) for name, _ in SPECTRUM_COLUMNS]])
    details = []
    for number, site in enumerate(sites):
        figure = new_figure(3.3, 2.3)
        draw_spectrum(site, figure.subplots(), explained=False)
        text = f"Eigenvalues of {site['name']}: bulk, signal, fitted law and edge."
        details.append(
            {
                "title": site["name"],
                "summary": f"{site['width']} wide, {site['spectral_rank']} above the edge, {site['planned']} planned",
                "picture": picture(figure, f"{key}-{number}", text),
                "warnings": site["warnings"],
            }
        )
    return [
        {"title": f"{prefix}Eigenvalues site by site", "paragraphs": [READING], "legend": LEGEND, "details": details},
        table(f"{prefix}Spectra in numbers", head, rows, notes=notes),
    ]
