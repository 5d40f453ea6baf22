"""The page about spectra and a plan: a model that is not cut yet, or one stage of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .figures import draw_budget, draw_spectrum, new_figure
from .html import picture, render, table


__all__ = ["spectra_page", "spectra_sections"]

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
    before, after = report["parameters"], report["planned_parameters"]
    facts = [("parameters", f"{before:,}"), ("planned", f"{after:,} ({after / before - 1:+.1%})")]
    return render("Spectra and plan", facts, spectra_sections(report, "", "s"), report["recipe"])


def spectra_sections(report: Mapping[str, Any], prefix: str, key: str) -> list[dict[str, Any]]:
    """Sections of one `SpectralReport.to_dict()`.

    Args:
        prefix: of their titles. key: of the ids of their figures.
    """
    sections, sites = [], report["sites"]
    if report.get("note"):
        sections.append({"title": f"{prefix}No target", "text": report["note"]})
    if report["budget"]:
        figure = new_figure()
        draw_budget(report, figure.subplots())
        text = "Each point is a move of the allocation; the dot is the size that was taken."
        text += f" Widths are {report['steps']}." if report.get("steps") else ""
        sections.append({"title": f"{prefix}Budget", "figures": [picture(figure, f"{key}-budget", text)]})
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
    sections.append(table(f"{prefix}Spectra", head, rows, notes=notes))
    details = []
    for number, site in enumerate(sites):
        figure = new_figure()
        draw_spectrum(site, figure.subplots())
        text = f"Eigenvalues of {site['name']}: bulk, signal, fitted law and edge."
        details.append(
            {
                "title": site["name"],
                "summary": f"{site['width']} wide, {site['spectral_rank']} above the edge, {site['planned']} planned",
                "picture": picture(figure, f"{key}-{number}", text),
                "warnings": site["warnings"],
            }
        )
    sections.append({"title": f"{prefix}Eigenvalues site by site", "details": details})
    return sections
