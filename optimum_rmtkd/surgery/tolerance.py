"""The smallest model that loses no more of a metric than its user allows: sizes of the budget's curve are cut and
measured, by bisection."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..config import RMTKDConfig
from ..errors import BudgetError, RMTKDError
from ..models import count_parameters, uncut_parameters
from ..validation.wording import a_kind, shown
from .budget import MET, BudgetPoint
from .cautions import scale_of
from .planning import moves_of


if TYPE_CHECKING:
    from .surgeon import Surgeon

__all__ = [
    "Candidate",
    "Search",
    "allowed_loss",
    "bisected",
    "check_evaluate",
    "keeps_tolerance",
    "measured",
    "search_size",
]

ROUNDING = 1e-9  # 0.9 - 0.895 is more than 0.005


def allowed_loss(tolerance: float, baseline: float, greater_is_better: bool) -> float:
    """How far a metric may lie on the wrong side of the uncut model's.

    Args:
        tolerance: points: hundredths of a metric that lies in [-1, 1], whole ones of one in percent, percent of a
            larger one, and of one that is to be small.
    """
    return tolerance / 100 * (scale_of(abs(baseline)) if greater_is_better else abs(baseline))


def keeps_tolerance(tolerance: float, value: float, baseline: float, greater_is_better: bool) -> bool:
    """Whether a metric lies no further from the uncut model's than that, but for rounding; NaN does not."""
    lost = baseline - value if greater_is_better else value - baseline
    return lost <= allowed_loss(tolerance, baseline, greater_is_better) + ROUNDING * abs(baseline)


@dataclass(frozen=True)
class Candidate:
    """A size that was tried.

    Attributes:
        parameters: of the narrow model. couples: {couple: features of a group}.
        curve: the moves of the budget that lead there.
        value: of the metric; not finite where the model gave none.
        kept: whether it keeps the tolerance.
        student, projections: the model and its stream's projection; None for those that are let go.
    """

    parameters: int
    couples: dict[str, int] = field(repr=False)
    curve: tuple[BudgetPoint, ...] = field(repr=False)
    value: float
    kept: bool
    student: PreTrainedModel | None = field(default=None, repr=False)
    projections: dict[str, torch.Tensor] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Search:
    """The path to a size.

    Attributes:
        surgeon: who cut.
        baseline: the metric of the uncut model. allowed: what may be lost of it.
        parameters: of the uncut model.
        path: every size that was tried, in order; only that of `found` has its model.
        found: the smallest that keeps the tolerance.
    """

    surgeon: Surgeon = field(repr=False)
    baseline: float
    allowed: float
    parameters: int
    path: tuple[Candidate, ...]
    found: Candidate

    def table(self) -> str:
        """The path, a line for each size."""
        return path_table(self.path, self.baseline, self.allowed, self.parameters, self.found)


def path_table(
    path: Sequence[Candidate], baseline: float, allowed: float, parameters: int, found: Candidate | None
) -> str:
    """A line for the uncut model and one for each size that was tried, in order."""
    rows = [("tried", "parameters", "removed", "metric", "lost", "")]
    rows.append(("uncut", f"{parameters:,}", "", f"{baseline:.4f}", "", f"may lose {allowed:.4g}"))
    for number, tried in enumerate(path, 1):
        said = "taken" if tried is found else "kept" if tried.kept else "lost too much"
        lost = f"{abs(tried.value - baseline):.4f}" if math.isfinite(tried.value) else "-"
        sign = "" if tried.value == baseline else "-" if tried.value < baseline else "+"
        removed = f"{1 - tried.parameters / parameters:.1%}"
        rows.append((str(number), f"{tried.parameters:,}", removed, f"{tried.value:.4f}", sign + lost, said))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def check_evaluate(config: RMTKDConfig, evaluate: Any) -> None:
    """
    Raises:
        RMTKDError: a tolerance without something that measures, the reverse, or something that cannot be called.
    """
    if evaluate is None:
        raise RMTKDError(
            f"tolerance={config.tolerance} without evaluate: a size is found by measuring. Give a function of a model "
            "that returns its validation metric, or name a size (target_reduction)."
        )
    if config.tolerance is None:
        told = ", ".join(f"{name}={value}" for name, value in config.targets.items()) or "no target"
        raise RMTKDError(
            f"evaluate was given, and the recipe has {told}: it is asked only where tolerance says the size. Give "
            "RMTKDConfig(tolerance=0.5), or leave evaluate out."
        )
    if not callable(evaluate):
        raise RMTKDError(f"evaluate={shown(evaluate)}: expected a function of a model; got {a_kind(evaluate)}.")


def measured(evaluate: Callable[[PreTrainedModel], float], model: PreTrainedModel) -> float:
    """The metric of the uncut model.

    Raises:
        RMTKDError: it is no finite number.
    """
    value = _value(evaluate, model)
    if not math.isfinite(value):
        raise RMTKDError(
            f"evaluate returned {value} for the uncut model: expected a finite number, which the narrow ones are held "
            "against."
        )
    return value


def _value(evaluate: Callable[[PreTrainedModel], float], model: PreTrainedModel) -> float:
    was = model.training
    model.eval()
    try:
        value = evaluate(model)
    finally:
        model.train(was)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RMTKDError(
            f"evaluate returned {shown(value)}: expected one number, the validation metric; got {a_kind(value)}."
        )
    return float(value)


def bisected(sizes: Sequence[float], keeps: Callable[[int], bool], resolution: float) -> int | None:
    """The place of the smallest size that is kept, where all larger ones are; None where none is.

    Every place that is returned was asked about. Sizes nearer to each other than `resolution` are not told apart.

    Args:
        sizes: descending, the first of them kept and not asked about.
    """
    good, bad, last = 0, len(sizes), len(sizes) - 1
    while bad - good > 1 and sizes[good] - sizes[min(bad, last)] > resolution:
        middle = (sizes[good] + sizes[min(bad, last)]) / 2
        at = min(range(good + 1, bad), key=lambda i: (abs(sizes[i] - middle), i))
        good, bad = (at, bad) if keeps(at) else (good, at)
    if not good and bad > 1:  # nothing smaller within the resolution was asked about yet
        good = 1 if keeps(1) else 0
    return good or None


def search_size(
    surgeon: Surgeon, evaluate: Callable[[PreTrainedModel], float], baseline: float, greater_is_better: bool
) -> Search:
    """Cut and measure sizes of the budget's curve until the smallest that keeps the recipe's tolerance is known to one
    hundredth of the uncut model. The calibration, the prices and the curve are computed once.

    Raises:
        BudgetError: not even the first move keeps it, or there is none.
        RMTKDError: `evaluate` returns something else than a number.
    """
    whole = count_parameters(surgeon.source)
    allowed = allowed_loss(surgeon.config.tolerance, baseline, greater_is_better)
    couples = surgeon.couples(spectra=surgeon.config.allocation == "edge")
    moves, path = moves_of(surgeon, couples), []

    def keeps(at: int) -> bool:
        widths = {c.name: c.width for c in couples} | {move.couple: move.width for move in moves[:at]}
        student, projections = surgeon.operate(widths)
        value = _value(evaluate, student)
        kept = keeps_tolerance(surgeon.config.tolerance, value, baseline, greater_is_better)
        path[:] = [_let_go(tried) if kept else tried for tried in path]
        models = (student, projections) if kept else (None, None)
        path.append(Candidate(count_parameters(student), widths, tuple(moves[:at]), value, kept, *models))
        return kept

    sizes = [float(whole), *(move.cost for move in moves)]
    place = bisected(sizes, keeps, MET * uncut_parameters(surgeon.source))
    found = next((tried for tried in path if tried.student is not None), None)
    if place is None or found is None:
        table = path_table(path, baseline, allowed, whole, None)
        raise BudgetError(
            f"No size of {len(moves)} keeps tolerance={surgeon.config.tolerance} (a loss of {allowed:.4g}) without "
            f"training. Allow more, distil what is cut (RMTKDTrainer, compress without --no-train), or give more "
            f"calibration_samples.\n{table}"
        )
    return Search(surgeon, baseline, allowed, whole, tuple(path), found)


def _let_go(tried: Candidate) -> Candidate:
    return Candidate(tried.parameters, tried.couples, tried.curve, tried.value, tried.kept)
