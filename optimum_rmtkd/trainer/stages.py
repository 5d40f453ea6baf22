"""The schedule of the cuts, their records and the stop rules: plain functions over plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..config import ROUND_SHARE, SEARCH_ROUNDS, RMTKDConfig
from ..errors import BudgetError, RMTKDError
from ..files import write_text
from ..hub.measures import fit_text, number, stage_measures, stage_notes


__all__ = [
    "JOURNAL",
    "PlannedCut",
    "Stage",
    "geometric_shares",
    "metric_dropped",
    "metric_reached",
    "narrowest",
    "plan_cuts",
    "spread_steps",
    "stage_table",
    "too_narrow",
    "write_json",
    "write_journal",
]

JOURNAL = "rmtkd_stages.json"


@dataclass(frozen=True)
class PlannedCut:
    """One cut to come. `target_reduction` counts from the uncut model; None: the edge (or `target_flops`) decides."""

    index: int
    step: int
    target_reduction: float | None = None
    target_flops: float | None = None
    sites: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Stage:
    """What happened at one cut.

    Attributes:
        index, step: number of the stage, and optimizer steps done when it was cut.
        sites: one dictionary per site: name, kind, width_before, width_after, edge, rank.
        parameters_before, parameters_after: of the model, tied ones once.
        metric_name, metric_before, metric_cut, metric_after: validation before the cut, just after it, at the end of
            the stage; None without an eval_dataset. It is the one that judges the stage.
        metrics_before, metrics_cut, metrics_after: all numbers that the evaluation returned at these moments, without
            times and speeds (`hub.measures.of_quality`), that one included.
        predicted_loss: what the cut was predicted to add to the task loss of an answer, in nats (`BudgetPoint`).
        divergence, divergence_after: of the model just after the cut, untrained, and at the end of the stage, from the
            uncut one, in nats an answer.
        learning_rate: peak rate of the distillation of this stage.
        note: one line of what was noticed, for people.
        status: "open" (being distilled), "accepted", "rolled_back" (metric fell too far), "rejected" (never applied).
        reason: why it was rolled back or rejected, or why no further one follows.
    """

    index: int
    step: int
    sites: tuple[dict[str, Any], ...]
    parameters_before: int
    parameters_after: int
    target_reduction: float | None = None
    metric_name: str | None = None
    metric_before: float | None = None
    metric_cut: float | None = None
    metric_after: float | None = None
    metrics_before: dict[str, float] | None = None
    metrics_cut: dict[str, float] | None = None
    metrics_after: dict[str, float] | None = None
    predicted_loss: float | None = None
    divergence: float | None = None
    divergence_after: float | None = None
    learning_rate: float | None = None
    note: str | None = None
    status: str = "open"
    reason: str | None = None

    @property
    def accepted(self) -> bool:
        """Whether the model still has the widths of this stage."""
        return self.status in ("open", "accepted")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dictionary; non-finite numbers become None."""
        return _finite(asdict(self) | {"sites": [dict(site) for site in self.sites]})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Stage:
        """Inverse of `to_dict`."""
        known = {item.name for item in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known} | {"sites": tuple(values["sites"])})


def geometric_shares(target: float, rounds: int, kept: float = 1.0) -> tuple[float, ...]:
    """Reductions after each round when every round keeps the same share r of what is left: 1 - kept r^i, r^rounds =
    (1 - target) / kept.

    Args:
        kept: share of the uncut model's parameters that there are before the first round.
    """
    ratio = (1.0 - target) / kept
    return tuple(1.0 - kept * ratio ** (i / rounds) for i in range(1, rounds)) + (target,)


def spread_steps(cuts: int, max_steps: int, share: float) -> tuple[int, ...]:
    """Steps of the cuts: the first before step one, the last at `share` of the training, at least one step apart.

    Raises:
        RMTKDError: fewer training steps than cuts.
    """
    if cuts > max_steps:
        raise RMTKDError(
            f"{cuts} cuts in {max_steps} training steps: every stage needs at least one step to be distilled. Train "
            "longer (max_steps, num_train_epochs), or lower `rounds` or restrict `sites`."
        )
    steps: list[int] = []
    for i in range(cuts):
        wanted = round(i * share * max_steps / max(cuts - 1, 1))
        steps.append(max(wanted, steps[-1] + 1) if steps else 0)
    # The push to one step apart may run past the end when the share is tiny; pull back from the right.
    for i in range(cuts - 1, -1, -1):
        steps[i] = min(steps[i], max_steps - (cuts - i))
    return tuple(steps)


def plan_cuts(
    config: RMTKDConfig, max_steps: int, groups: Sequence[Sequence[str]] = (), kept: float = 1.0
) -> tuple[PlannedCut, ...]:
    """All cuts of a run.

    Args:
        groups: for schedule="layerwise", the sites of each layer, shallow to deep. Each is cut at its spectral edge;
            with a target the run stops once it is met.
        kept: share of the uncut model's parameters that there are now.
    """
    if config.schedule == "none":
        return ()
    if config.schedule == "layerwise":
        steps = spread_steps(len(groups), max_steps, config.span_of_cuts)
        return tuple(PlannedCut(i, s, sites=tuple(g)) for i, (s, g) in enumerate(zip(steps, groups, strict=True)))
    if config.tolerance is not None:
        return _rounds_of_search(config, max_steps, kept)
    target = config.target_flops
    if config.target_reduction is not None:
        target = 1.0 - (1.0 - config.target_reduction) / kept
    rounds = config.rounds or 1
    steps = spread_steps(rounds, max_steps, config.span_of_cuts)
    if config.target_reduction is not None:
        shares = geometric_shares(config.target_reduction, rounds, kept)
        return tuple(PlannedCut(i, s, target_reduction=t) for i, (s, t) in enumerate(zip(steps, shares, strict=True)))
    # FLOPs are counted against the model at hand, so every round removes the same share of what is left.
    flops = None if target is None else 1.0 - (1.0 - target) ** (1.0 / rounds)
    return tuple(PlannedCut(i, s, target_flops=flops) for i, s in enumerate(steps))


def _rounds_of_search(config: RMTKDConfig, max_steps: int, kept: float) -> tuple[PlannedCut, ...]:
    """Rounds that each remove the same share of what is left: as many as there may be, for the first that loses too
    much ends them."""
    rounds = config.rounds or max(1, min(SEARCH_ROUNDS, max_steps))
    left = 1.0 - (config.round_share or ROUND_SHARE)
    steps = spread_steps(rounds, max_steps, config.span_of_cuts)
    return tuple(PlannedCut(i, s, target_reduction=1.0 - kept * left ** (i + 1)) for i, s in enumerate(steps))


def check_target(config: RMTKDConfig, parameters: int, reference: int) -> None:
    """Refuse a target that the model already meets.

    Raises:
        BudgetError: nothing to remove.
    """
    if config.target_reduction is None:
        return
    allowed = round((1.0 - config.target_reduction) * reference)
    if parameters <= allowed:
        raise BudgetError(
            f"The model has {parameters:,} parameters, {1 - parameters / reference:.1%} less than the {reference:,} "
            f"of the uncut one; target_reduction={config.target_reduction} asks for at most {allowed:,}, which it "
            "already meets. Give a larger target_reduction, or train it with a plain Trainer."
        )


def narrowest(sites: Iterable[dict[str, Any]]) -> tuple[str, float] | None:
    """(name, width after / width before) of the site cut hardest; None without sites. Those of a block that went as a
    whole are none that are too narrow."""
    widths = [(site["width_after"], site["width_before"], site["name"]) for site in sites]
    ratios = [(after / before, name) for after, before, name in widths if after and before]
    return (min(ratios)[1], min(ratios)[0]) if ratios else None


def too_narrow(sites: Iterable[dict[str, Any]], least: float) -> str | None:
    """Why a cut is not made: a site would keep less than the share `least` of its width; None where all keep it."""
    hardest = narrowest(sites)
    if hardest is None or hardest[1] >= least:
        return None
    return f"{hardest[0]} would keep {hardest[1]:.3f} of its width, min_rank_ratio is {least:g}"


def metric_reached(value: float, baseline: float, share: float, greater_is_better: bool) -> bool:
    """Has the metric come back to `share` of its value before the first cut? (a loss: to 1 / share of it)"""
    return value >= share * baseline if greater_is_better else value * share <= baseline


def metric_dropped(value: float, baseline: float, allowed: float, greater_is_better: bool) -> bool:
    """Does the metric lie more than `allowed` below the uncut model's (a loss: above)? NaN counts as a drop."""
    return not ((baseline - value if greater_is_better else value - baseline) <= allowed)


def stage_table(stages: Sequence[Stage], fit: Mapping[str, Any] | None = None) -> str:
    """The stages as a table for people: sizes and the metric that judged them, then everything else that was measured.

    Args:
        fit: as in `write_journal`.
    """
    rows = [("stage", "step", "parameters", "removed", "metric before", "cut", "after", "status")]
    for stage in stages:
        removed = 1 - stage.parameters_after / stages[0].parameters_before
        metrics = [number(m) for m in (stage.metric_before, stage.metric_cut, stage.metric_after)]
        status = stage.status + (f" ({stage.reason})" if stage.reason else "")
        size = f"{stage.parameters_before:,} -> {stage.parameters_after:,}"
        rows.append((str(stage.index), str(stage.step), size, f"{removed:.1%}", *metrics, status))
    lines = _aligned(rows)
    if name := next((s.metric_name for s in stages if s.metric_name), None):
        lines[0] += f"   [metric: {name}]"
    records = [stage.to_dict() for stage in stages]
    if measured := stage_measures(records):
        others = [(what, str(index), *map(number, values)) for what, index, *values in measured]
        lines += ["", *_aligned([("also measured", "stage", "before", "cut", "after"), *others])]
    lines += stage_notes(records)
    fitted = fit_text(fit, records)
    return "\n".join([*([fitted] if fitted else []), *lines])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def write_journal(
    folder: str | Path,
    stages: Sequence[Stage],
    config: RMTKDConfig,
    reference: int,
    parameters: int,
    *,
    fit: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Mapping[str, float] | None] | None = None,
) -> None:
    """Write `rmtkd_stages.json`: what is known so far, whole or not at all.

    Args:
        fit: {"steps", "share", "why"} of the phase in which the model was fine-tuned before its first cut; None
            without one.
        metrics: {"before": ..., "after": ...}: all metrics of the model before its first cut, and now; None: those of
            the stages' records.
    """
    if metrics is None and any(stage.metrics_before for stage in stages):
        standing = [stage.metrics_after for stage in stages if stage.accepted]
        metrics = {"before": stages[0].metrics_before, "after": standing[-1] if standing else None}
    values = {
        "version": 1,
        "parameters_before": reference,
        "parameters_after": parameters,
        "reduction": 1 - parameters / reference,
        "recipe": config.to_dict(),
        "fit": None if fit is None else dict(fit),
        "metrics": None if metrics is None else dict(metrics),
        "stages": [stage.to_dict() for stage in stages],
    }
    write_json(Path(folder) / JOURNAL, values)


def write_json(path: Path, values: Any) -> None:
    """Whole or not at all; what is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_finite(values), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
