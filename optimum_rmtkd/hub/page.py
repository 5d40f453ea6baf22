"""The HTML report: one self-contained page, no network, no script but its own few lines."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import UNSIGNED, sign
from . import plots
from .card import comparison_rows, measure_rows, sentence, stage_rows
from .measures import fit_text, stage_notes
from .run import Run


if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PAGE", "report_page", "spectra_page"]

PAGE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
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


def report_page(run: Run) -> str:
    """HTML of a whole run, signed.

    Raises:
        RMTKDError: matplotlib (the extra `report`) is not installed.
    """
    sections = []
    if rows := comparison_rows(run):
        sections.append(_table("Before and after", ("", "before", "after", "change"), rows))
    if trimmings := run.vocabulary:
        lines = [line for trimming in trimmings for line in (*([trimming.when] * run.narrowed), *trimming.notes)]
        sections.append({"title": "Vocabulary", "text": "\n".join(lines)})
    if run.stages:
        head = ("stage", "step", "parameters", "removed", "metric before", "just cut", "after", "status")
        figure = plots.new_figure()
        plots.draw_stages(run.stages, figure.subplots())
        text = (
            "Bars: parameters left. Line: the validation metric, uncut, then just after each cut (left) and at the "
            "end of its stage (right)."
        )
        sections.append(_table("Stages", head, stage_rows(run), figures=[_picture(figure, "stages", text)]))
        sections[-1]["remarks"] = [*filter(None, [sentence(fit_text(run.fit, run.stages))]), *stage_notes(run.stages)]
    if rows := measure_rows(run):
        head = ("measured", "stage", "before", "just cut", "after")
        sections.append(_table("All metrics of the stages", head, rows))
    if widths := plots.widths_of(run):
        figure = plots.new_figure(height=1.0 + 0.2 * len(widths))
        plots.draw_widths(widths, figure.subplots())
        rows = [
            (n, w["width_before"], w["width_after"], w["width_after"] / w["width_before"]) for n, w in widths.items()
        ]
        picture = _picture(figure, "widths", "Width of every site before and after the reduction.")
        sections.append(_table("Width map", ("site", "before", "after", "share kept"), rows, figures=[picture]))
    if plots.curve_names(run.history):
        figure = plots.new_figure()
        plots.draw_curves(run.history, run.stages, figure.subplots())
        text = "Losses over training steps; dashed lines mark the cuts."
        sections.append({"title": "Training", "figures": [_picture(figure, "training", text)]})
    for index, report in run.spectra.items():
        sections += _spectra_sections(report, f"Stage {index}: " if len(run.spectra) > 1 else "", f"s{index}")
    facts = [("base model", run.base_model), ("architecture", run.architecture), ("task", run.task or "")]
    return _render(
        f"Reduction of {run.base_model or run.name}", [fact for fact in facts if fact[1]], sections, run.recipe
    )


def spectra_page(report: Mapping[str, Any]) -> str:
    """HTML of one `SpectralReport.to_dict()`, signed: spectra and plan, nothing cut yet."""
    before, after = report["parameters"], report["planned_parameters"]
    facts = [("parameters", f"{before:,}"), ("planned", f"{after:,} ({after / before - 1:+.1%})")]
    return _render("Spectra and plan", facts, _spectra_sections(report, "", "s"), report["recipe"])


def _spectra_sections(report: Mapping[str, Any], prefix: str, key: str) -> list[dict[str, Any]]:
    sections, sites = [], report["sites"]
    if report.get("note"):
        sections.append({"title": f"{prefix}No target", "text": report["note"]})
    if report["budget"]:
        figure = plots.new_figure()
        plots.draw_budget(report, figure.subplots())
        text = "Each point is a move of the allocation; the dot is the size that was taken."
        text += f" Widths are {report['steps']}." if report.get("steps") else ""
        picture = _picture(figure, f"{key}-budget", text)
        sections.append({"title": f"{prefix}Budget", "figures": [picture]})
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
    sections.append(_table(f"{prefix}Spectra", head, rows, notes=notes))
    details = []
    for number, site in enumerate(sites):
        figure = plots.new_figure()
        plots.draw_spectrum(site, figure.subplots())
        text = f"Eigenvalues of {site['name']}: bulk, signal, fitted law and edge."
        details.append(
            {
                "title": site["name"],
                "summary": f"{site['width']} wide, {site['spectral_rank']} above the edge, {site['planned']} planned",
                "picture": _picture(figure, f"{key}-{number}", text),
                "warnings": site["warnings"],
            }
        )
    sections.append({"title": f"{prefix}Eigenvalues site by site", "details": details})
    return sections


def _table(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    notes: Sequence[str] = (),
    figures: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [any(cell["number"] for cell in column) for column in zip(*cells, strict=True)] or [False] * len(head)
    names = [
        {"name": name, "note": note, "number": number}
        for name, note, number in zip(head, notes or [""] * len(head), numeric, strict=True)
    ]
    return {"title": title, "head": names, "rows": cells, "figures": figures}


def _cell(value: Any) -> dict[str, Any]:
    """Text of a cell, and the number it is sorted by where it is or starts with one."""
    if value is None:
        return {"text": "–", "key": "", "number": True}
    if isinstance(value, (int, float)):
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return {"text": text, "key": value, "number": True}
    found = re.match(r"[+-]?[\d,]*\.?\d+", value)
    return {"text": value, "key": float(found[0].replace(",", "")) if found else value, "number": bool(found)}


def _picture(figure: Figure, key: str, text: str) -> dict[str, str]:
    return {"svg": to_svg(figure, key, text), "text": text}


def to_svg(figure: Figure, key: str, text: str) -> str:
    """The figure as an `svg` element that takes its colours from the page, its ids made unique by `key`."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rmtkd", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for name, colour in plots.PALETTE.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = svg.replace("url(#", f"url(#{key}-").replace('href="#', f'href="#{key}-')
    width, height = figure.get_size_inches()
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    box = f"0 0 {72 * width:g} {72 * height:g}"
    head = f'<svg role="img" aria-label="{html.escape(text)}" viewBox="{box}" {spaces}>'
    return head + svg[svg.index(">") + 1 :]


def _render(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Mapping], recipe: Mapping) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    blank = {"text": "", "figures": (), "rows": (), "remarks": (), "details": ()}
    keyed = [blank | dict(s) | {"key": f"part-{i}"} for i, s in enumerate(sections)]
    page = environment.get_template("report.html.jinja").render(
        title=title, facts=facts, sections=keyed, recipe=sorted(recipe.items()), generator=UNSIGNED
    )
    return sign(page.encode("utf8", "replace").decode("utf8"))  # halves of characters, which JSON may hold
