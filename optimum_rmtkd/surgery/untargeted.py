"""A recipe without a target: where the spectral edge decides, and what is said where it means nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ..config import TARGETS, RMTKDConfig
from ..errors import NoTargetError
from .budget import BudgetPoint
from .cautions import MUCH


__all__ = ["SHARES", "asks_for_edges", "curve_table", "has_target", "no_size", "no_target", "whole_sites"]

SHARES = (0.3, 0.5, 0.63, 0.8)  # what the curve in the message is read at; the greedy descent ends at the last
DEFAULT_ESTIMATOR = next(f.default for f in dataclasses.fields(RMTKDConfig) if f.name == "edge_estimator")


def has_target(config: RMTKDConfig) -> bool:
    """Whether a budget decides."""
    return bool(config.targets)


def asks_for_edges(config: RMTKDConfig) -> bool:
    """Whether the user named an edge estimator: then its edge is taken as it is, whatever it means."""
    return config.edge_estimator != DEFAULT_ESTIMATOR


def curve_table(curve: Sequence[BudgetPoint], parameters: float, whole: float, unit: str, per: float) -> str:
    """What sizes are predicted to cost: one line for each of SHARES.

    Args:
        curve: the moves of one descent. parameters, whole: of the model now, and before its first cut.
        unit: of the predicted losses once they are divided by `per`.
    """
    lines = [f"  {'target_reduction':>16}  {'parameters':>14}  predicted loss ({unit})"]
    for share in SHARES:
        goal = (1 - share) * whole
        point = next((p for p in curve if p.cost <= goal), None)
        if parameters <= goal:
            lines.append(f"  {share:16g}  {'met already':>14}")
        elif point is None:
            least = curve[-1].cost if curve else parameters
            lines.append(f"  {share:16g}  {'out of reach':>14}  (at most {max(0.0, 1 - least / whole):.2f})")
        else:
            lines.append(f"  {share:16g}  {point.cost:14,.0f}  {point.predicted_loss / per:.3g}")
    return "\n".join(lines)


def no_target(config: RMTKDConfig, doubts: Mapping[str, str | None], lost: float | None, curve: str) -> NoTargetError:
    """The error of a recipe without a target, for a model whose edges do not say how far to cut it.

    Args:
        doubts: {site: why its edge means nothing, or None}.
        lost: what a cut of the other sites at their edges is predicted to cost, in nats an answer.
    """
    reasons = [f"{name}: {why}" for name, why in doubts.items() if why is not None]
    if lost is not None and lost > MUCH:
        found = (
            f"the edges of {len(doubts) - len(reasons)} of {len(doubts)} sites stand apart, but what lies below them "
            f"carries {lost:.2g} nats an answer (at most {MUCH:.2g})"
        )
    elif reasons:
        more = f"; {len(reasons) - 1} more" if len(reasons) > 1 else ""
        found = f"at {len(reasons)} of {len(doubts)} sites there is no separated bulk of noise ({reasons[0]}{more})"
    else:
        found = f"the edges of all {len(doubts)} sites leave them as wide as they are"
    return NoTargetError(
        f"No target was given, none of {', '.join(TARGETS)}, and the spectra do not say how far to cut: "
        f"{found}. Give a size, for example target_reduction=0.5 (--target-reduction 0.5); below is what sizes are "
        "predicted to cost before any distillation. An edge is taken as it is where its estimator is named "
        f"(edge_estimator other than {config.edge_estimator!r}).",
        curve,
    )


def no_size(config: RMTKDConfig, curve: str) -> NoTargetError:
    """The error where a recipe's tolerance is to say the size, and nothing is measured that could."""
    return NoTargetError(
        f"tolerance={config.tolerance} says how much of a metric may be lost, not how far to cut: a size is found by "
        "measuring. Give narrow a function (evaluate=), train with an eval_dataset (RMTKDTrainer, RMTKDLoop), or run "
        "optimum-cli rmtkd compress; below is what sizes are predicted to cost.",
        curve,
    )


def whole_sites(doubts: Mapping[str, str | None]) -> str:
    """One line about the sites that keep their width while others are cut at their edge; empty without any."""
    kept = [(name, why) for name, why in doubts.items() if why is not None]
    if not kept:
        return ""
    (name, why), more = kept[0], "; ..." if len(kept) > 1 else ""
    return (
        f"No target was given: {len(doubts) - len(kept)} of {len(doubts)} sites are cut at their spectral edge, the "
        f"others keep their width, having no separated bulk of noise ({name}: {why}{more})."
    )
