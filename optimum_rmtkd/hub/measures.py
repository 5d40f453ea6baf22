"""What was measured of a run, in the words of tables: every metric of its evaluations, and what a cut was predicted to
cost. Plain functions over the plain dictionaries of `rmtkd_stages.json`."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


__all__ = [
    "MOMENTS",
    "fit_text",
    "is_number",
    "metric_changes",
    "number",
    "of_quality",
    "stage_measures",
    "stage_notes",
]

MOMENTS = ("before", "cut", "after")
SPEED = ("_runtime", "_per_second", "_preparation_time", "_compilation_time", "_num_tokens")
SPEED_PARTS = ("_mem_", "_memory_")


def of_quality(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among what an evaluation returned that judge the model: no times, no speeds, no memory, no epoch."""
    return {
        name: float(value)
        for name, value in ((name, _one(value)) for name, value in metrics.items())
        if isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and name != "epoch"
        and not name.endswith(SPEED)
        and not any(part in name for part in SPEED_PARTS)
    }


def _one(value: Any) -> Any:
    """What an array or a tensor of one element holds."""
    single = hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1
    return value.item() if single else value


def is_number(value: Any) -> bool:
    """Whether a value of a record is a finite number: records are files, which anybody may have written."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def number(value: float | None) -> str:
    """A figure of a table: four digits after the point, of large and tiny ones four that count; "-" for none."""
    if not is_number(value):
        return "-"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.4g}"


def stage_measures(
    stages: Sequence[Mapping[str, Any]],
) -> list[tuple[str, int, float | None, float | None, float | None]]:
    """Rows (what, stage, before, just after the cut, after) of all that was measured of the stages beside the metric
    that judged them."""
    judged = {stage.get("metric_name") for stage in stages}
    found = [{moment: stage.get(f"metrics_{moment}") or {} for moment in MOMENTS} for stage in stages]
    names = dict.fromkeys(name for stage in found for moment in MOMENTS for name in stage[moment])
    rows = []
    for name in (name for name in names if name not in judged):
        for stage, values in zip(stages, found, strict=True):
            row = [values[moment].get(name) for moment in MOMENTS]
            rows += [(name, stage["index"], *row)] if any(value is not None for value in row) else []
    for key, name in (("predicted_loss", "added loss, predicted"), ("divergence", "divergence from uncut, nats")):
        for stage in stages:
            values = [stage.get(moment) for moment in (key, f"{key}_after")]
            if key == "divergence":  # is not negative: rounding is
                values = [max(0.0, value) if is_number(value) else value for value in values]
            rows += [(name, stage["index"], None, *values)] if any(value is not None for value in values) else []
    return rows


def stage_notes(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines about the stages that have something to say, their learning rates and what was noticed; neighbours that
    say the same have one together."""
    lines = []
    for text, alike in itertools.groupby(stages, _note):
        numbers = [str(stage["index"]) for stage in alike]
        which = f"stage {numbers[0]}" if len(numbers) == 1 else f"stages {numbers[0]} to {numbers[-1]}"
        lines += [f"{which}: {text}"] if text else []
    return lines


def _note(stage: Mapping[str, Any]) -> str:
    rate = stage.get("learning_rate")
    return "; ".join([*([f"learning rate {rate:.3g}"] if is_number(rate) else []), *filter(None, [stage.get("note")])])


def fit_text(fit: Mapping[str, Any] | None, stages: Sequence[Mapping[str, Any]]) -> str:
    """One line about the phase in which the model was fine-tuned before its first cut; "" without one."""
    if not fit or not fit.get("steps"):
        return ""
    share = f", {fit['share']:.0%} of the training" if fit.get("share") is not None else ""
    text = f"fine-tuned first: {fit['steps']:,} steps{share}"
    text += f" ({fit['why']})" if fit.get("why") else ""
    first = stages[0] if stages else {}
    if first.get("metric_name") and first.get("metric_before") is not None:
        text += f"; {first['metric_name']} {number(first['metric_before'])} at its end"
    return text


def metric_changes(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, without: Iterable[str] = ()
) -> list[tuple[str, str, str, str]]:
    """Rows (metric, before, after, change) of all metrics that were measured at one of the two moments, named without
    eval_."""
    before, after = before or {}, after or {}
    rows = []
    for key in dict.fromkeys([*before, *after]):
        name, values = key.removeprefix("eval_"), (before.get(key), after.get(key))
        if name not in without and any(value is not None for value in values):
            change = f"{values[1] - values[0]:+.4f}" if all(map(is_number, values)) else ""
            rows.append((name, *map(number, values), change))
    return rows
