"""Whether an edge means something: a bulk of noise that stands apart, and rules that agree on where it ends."""

from __future__ import annotations

import math

from .edges import is_control
from .subspace import SignalSubspace


__all__ = ["AGREEMENT", "FIT", "doubt"]

AGREEMENT = 0.2  # by which share the ranks of all estimators may differ, or by one direction
FIT = 0.1  # Kolmogorov-Smirnov distance up to which the rest counts as noise, and one step: few values move in jumps


def doubt(found: SignalSubspace) -> str | None:
    """Why the edge of a spectrum does not say how many directions are signal; None where it does.

    It does where what lies below the edge has the law of noise, and all estimators that have a model of noise and
    apply find the same rank, within AGREEMENT. On trained networks the spectrum mostly falls without a gap: rules then
    differ by factors, and each is a budget in disguise.

    Args:
        found: with the ranks of the other estimators (`compare=True`).
    """
    if is_control(found.estimator):
        return f"{found.estimator} has no model of noise" if found.dim > 1 else "a single direction"
    ranks = {found.estimator: found.spectral_rank} | {k: v for k, v in found.ranks.items() if not is_control(k)}
    least, most = min(ranks, key=ranks.__getitem__), max(ranks, key=ranks.__getitem__)
    if ranks[least] < 1:
        return f"nothing lies above the edge by {least}"
    if ranks[most] - ranks[least] > max(1, AGREEMENT * ranks[least]):
        return f"the rank is {ranks[least]} by {least} and {ranks[most]} by {most}, of {found.dim}"
    bulk = found.dim - found.null_directions - found.spectral_rank
    if math.isnan(found.ks_distance):
        return "fewer than two directions lie below the edge"
    if found.ks_distance > (allowed := FIT + 1 / bulk):
        return f"what lies below the edge is no noise: Kolmogorov-Smirnov {found.ks_distance:.2f} (> {allowed:.2f})"
    return found.details.get("warning")
