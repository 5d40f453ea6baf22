"""Weights that change over the training: a number, or a rule from the share of steps done to a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from ...errors import RMTKDError
from ...validation import AtLeastZero, Interval, Length, check_value
from ...validation.wording import shown


__all__ = ["SCHEDULES", "Weight", "check_weight", "weight_at"]

Weight = Annotated[float, Interval(0, what="a weight")] | Mapping[str, Any]  # a number or a schedule
Shares = Annotated[tuple[Annotated[float, Interval(0, 1, what="a share of the training steps")], ...], Length(2, 2)]

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 * (1 - math.cos(math.pi * x)),
    "step": lambda x: float(x >= 1),
}
KEYS = {"schedule", "start", "end", "over"}


def check_weight(weight: Any, owner: str) -> float | dict[str, Any]:
    """A weight as it is kept: a number of at least 0, or {"schedule", "start", "end", "over"} with all four keys.

    Args:
        weight: a number; or a mapping: from `start` to `end` while the share of steps done runs through `over`
            (default [0, 1]), constant before and after; `schedule` is one of `SCHEDULES` (default linear; step: `end`
            from the end of `over` on).

    Raises:
        RMTKDError: neither, or values out of range.
    """
    if isinstance(weight, Mapping):
        rule = {"schedule": "linear", "over": (0.0, 1.0), **weight}
        word = rule["schedule"]
        if set(rule) != KEYS or not isinstance(word, str) or word not in SCHEDULES:
            raise RMTKDError(
                f"{owner}(weight={shown(dict(weight))}): expected start, end, and perhaps over=[from, to] and "
                f"schedule, one of {', '.join(SCHEDULES)}."
            )
        start, end = (check_value(rule[key], AtLeastZero, f"weight[{key!r}]", owner) for key in ("start", "end"))
        begin, stop = check_value(rule["over"], Shares, "weight['over']", owner)
        if not begin < stop:
            raise RMTKDError(f"{owner}(weight over={[begin, stop]}): expected shares 0 <= from < to <= 1.")
        return {"schedule": word, "start": start, "end": end, "over": [begin, stop]}
    return check_value(weight, Weight, "weight", owner)


def weight_at(weight: float | Mapping[str, Any], progress: float) -> float:
    """Value of a checked weight after the share `progress` of the training steps, in [0, 1]."""
    if not isinstance(weight, Mapping):
        return weight
    begin, stop = weight["over"]
    x = min(1.0, max(0.0, (progress - begin) / (stop - begin)))
    return weight["start"] + (weight["end"] - weight["start"]) * SCHEDULES[weight["schedule"]](x)
