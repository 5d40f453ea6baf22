"""What `compress --no-train --tolerance` does: sizes are cut and measured until the smallest is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..config import RMTKDConfig
from .training import TrainingOptions


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..trainer import Stage
    from .language import LanguageTask
    from .task import Task

__all__ = ["found_size"]


def found_size(
    task: Task | LanguageTask, training: TrainingOptions, recipe: RMTKDConfig, folder: Path
) -> tuple[PreTrainedModel, tuple[Stage, ...], tuple[str, ...]]:
    """The smallest model that keeps the recipe's tolerance; a stage for each size that was tried, measured; and the
    table of them. The spectra go into `folder`."""
    from ..hub import write_spectra
    from ..surgery import narrow_within
    from ..trainer import Stage

    seen: list[dict[str, float]] = []

    def evaluate(model: PreTrainedModel) -> float:
        seen.append(task.measure(model, training.eval_batch_size))
        return seen[-1][task.judged_by]

    loader = task.calibration_loader(training.batch_size, recipe.seed)
    reduction, search = narrow_within(task.model, loader, recipe, evaluate, greater_is_better=task.greater_is_better)
    stages = []
    for index, (tried, metrics) in enumerate(zip(search.path, seen[1:], strict=True)):
        taken = tried is search.found
        kept = "keeps the tolerance, as a smaller size does" if tried.kept else "loses more than the tolerance"
        stages.append(
            Stage(
                index=index,
                step=0,
                sites=tuple(site.to_dict() for site in reduction.sites) if taken else (),
                parameters_before=search.parameters,
                parameters_after=tried.parameters,
                metric_name=task.judged_by,
                metric_before=search.baseline,
                metric_cut=tried.value,
                metric_after=tried.value,
                metrics_before=seen[0],
                metrics_cut=metrics,
                metrics_after=metrics,
                status="accepted" if taken else "rejected",
                reason="the smallest that keeps the tolerance, without training" if taken else kept,
            )
        )
        if taken:
            write_spectra(folder, index, reduction.report)
    return reduction.model, tuple(stages), (search.table(), "")
