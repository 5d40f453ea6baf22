"""The report of a run: one self-contained page, which answers first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..pages.figures import new_figure
from ..pages.html import picture, render, table
from ..pages.rounding import share
from ..pages.spectra import budget_sections, map_section, spectra_sections
from . import plots
from .card import comparison_rows, sentence, stage_rows
from .headline import headline_tiles
from .measures import fit_text, is_number, stage_measures, stage_notes
from .run import Run


__all__ = ["PAGE", "report_page"]

PAGE = "report.html"
STAGE_HEAD = ("stage", "step", "parameters", "removed", "{} before", "just cut", "after", "status")
STAGE_NOTES = (
    "",
    "training step of the cut",
    "before and after this cut",
    "of the uncut model, with all cuts so far",
    "before this cut",
    "right after it",
    "at the end of the stage",
    "what became of the stage",
)


def report_page(run: Run) -> str:
    """HTML of a whole run, signed.

    Raises:
        RMTKDError: matplotlib (the extra `report`) is not installed.
    """
    sections = [*_widths(run), *_stages(run), *_comparison(run)]
    for index, report in run.spectra.items():
        sections += spectra_sections(report, f"Stage {index}: " if len(run.spectra) > 1 else "", f"s{index}")
    facts = [("base model", run.base_model), ("architecture", run.architecture), ("task", run.task or "")]
    facts = [fact for fact in facts if fact[1]]
    title = f"Reduction of {run.base_model or run.name}"
    return render(title, facts, sections, run.recipe, headline_tiles(run))


def _widths(run: Run) -> Iterator[dict[str, Any]]:
    """What became of each width, and the budget that led to it."""
    widths = plots.widths_of(run)
    if widths:
        rows = [(n, w["width_before"], w["width_after"], _kept(**w)) for n, w in widths.items()]
        listed = table("Width map", ("site", "before", "after", "kept"), rows, folded="All sites as a table")
        yield listed | map_section("Width map", [row[:3] for row in rows])
    several = len(run.spectra) > 1
    yield from budget_sections(
        [(f"Stage {index}. " if several else "", report) for index, report in run.spectra.items()]
    )


def _kept(width_before: int, width_after: int) -> str | None:
    return share(width_after / width_before, 0) if width_before > 0 else None


def _stages(run: Run) -> Iterator[dict[str, Any]]:
    """The cuts with all metrics, and the training between them."""
    if run.stages:
        name = run.metric[0] if run.metric else "metric"
        remarks = [*filter(None, [sentence(fit_text(run.fit, run.stages))]), *stage_notes(run.stages)]
        head = [column.format(name) for column in STAGE_HEAD]
        yield table("Stages", head, stage_rows(run), STAGE_NOTES, stacked=True, remarks=remarks)
        figure = new_figure()
        plots.draw_stages(run.stages, figure.subplots())
        text = "Bars: parameters left. Line: the metric of the uncut model, just after each cut, and at the end."
        yield {"title": "From stage to stage", "figures": [picture(figure, "stages", text)], "side": True}
    measured = [
        (what.removeprefix("eval_"), index, *(value if is_number(value) else None for value in values))
        for what, index, *values in stage_measures(run.stages)
    ]
    if measured:
        head = ("measured", "stage", "before", "just cut", "after")
        yield table("All metrics of the stages", head, measured, stacked=True)
    if plots.curve_names(run.history):
        figure = new_figure()
        plots.draw_curves(run.history, run.stages, figure.subplots())
        text = "Losses over training steps; dashed lines mark the cuts."
        yield {"title": "Training", "figures": [picture(figure, "training", text)], "side": bool(measured)}


def _comparison(run: Run) -> Iterator[dict[str, Any]]:
    """All that is known of before and after, and what was trimmed."""
    if rows := comparison_rows(run):
        yield table("Before and after", ("", "before", "after", "change"), rows, stacked=True)
    if trimmings := run.vocabulary:
        lines = [line for trimming in trimmings for line in (*([trimming.when] * run.narrowed), *trimming.notes)]
        yield {"title": "Vocabulary", "paragraphs": lines}
