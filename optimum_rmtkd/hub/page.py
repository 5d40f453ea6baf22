"""The report of a run: one self-contained page."""

from __future__ import annotations

from ..pages.figures import new_figure
from ..pages.html import picture, render, table
from ..pages.spectra import spectra_sections
from . import plots
from .card import comparison_rows, measure_rows, sentence, stage_rows
from .measures import fit_text, stage_notes
from .run import Run


__all__ = ["PAGE", "report_page"]

PAGE = "report.html"


def report_page(run: Run) -> str:
    """HTML of a whole run, signed.

    Raises:
        RMTKDError: matplotlib (the extra `report`) is not installed.
    """
    sections = []
    if rows := comparison_rows(run):
        sections.append(table("Before and after", ("", "before", "after", "change"), rows))
    if trimmings := run.vocabulary:
        lines = [line for trimming in trimmings for line in (*([trimming.when] * run.narrowed), *trimming.notes)]
        sections.append({"title": "Vocabulary", "text": "\n".join(lines)})
    if run.stages:
        head = ("stage", "step", "parameters", "removed", "metric before", "just cut", "after", "status")
        figure = new_figure()
        plots.draw_stages(run.stages, figure.subplots())
        text = (
            "Bars: parameters left. Line: the validation metric, uncut, then just after each cut (left) and at the "
            "end of its stage (right)."
        )
        sections.append(table("Stages", head, stage_rows(run), figures=[picture(figure, "stages", text)]))
        sections[-1]["remarks"] = [*filter(None, [sentence(fit_text(run.fit, run.stages))]), *stage_notes(run.stages)]
    if rows := measure_rows(run):
        head = ("measured", "stage", "before", "just cut", "after")
        sections.append(table("All metrics of the stages", head, rows))
    if widths := plots.widths_of(run):
        figure = new_figure(height=1.0 + 0.2 * len(widths))
        plots.draw_widths(widths, figure.subplots())
        rows = [
            (n, w["width_before"], w["width_after"], w["width_after"] / w["width_before"]) for n, w in widths.items()
        ]
        shown = picture(figure, "widths", "Width of every site before and after the reduction.")
        sections.append(table("Width map", ("site", "before", "after", "share kept"), rows, figures=[shown]))
    if plots.curve_names(run.history):
        figure = new_figure()
        plots.draw_curves(run.history, run.stages, figure.subplots())
        text = "Losses over training steps; dashed lines mark the cuts."
        sections.append({"title": "Training", "figures": [picture(figure, "training", text)]})
    for index, report in run.spectra.items():
        sections += spectra_sections(report, f"Stage {index}: " if len(run.spectra) > 1 else "", f"s{index}")
    facts = [("base model", run.base_model), ("architecture", run.architecture), ("task", run.task or "")]
    return render(
        f"Reduction of {run.base_model or run.name}", [fact for fact in facts if fact[1]], sections, run.recipe
    )
