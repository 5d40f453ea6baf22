"""Weights that change over the training: a number, or a rule from the share of steps done to a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import RMTKDError


__all__ = ["SCHEDULES", "check_weight", "weight_at"]

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
        if set(rule) != KEYS or rule["schedule"] not in tuple(
            SCHEDULES
        ):  # a tuple: what cannot be hashed is refused too
            raise RMTKDError(
                f"{owner}(weight={dict(weight)}): expected start, end, and perhaps over=[from, to] and schedule, one "
                f"of {', '.join(SCHEDULES)}."
            )
        try:
            begin, stop = (float(x) for x in rule["over"])
        except (TypeError, ValueError) as error:
            raise RMTKDError(f"{owner}(weight over={rule['over']!r}): expected two shares, [from, to].") from error
        values = [_number(rule[key], owner) for key in ("start", "end")]
        if not 0 <= begin < stop <= 1:
            raise RMTKDError(f"{owner}(weight over={list(rule['over'])}): expected shares 0 <= from < to <= 1.")
        return {"schedule": rule["schedule"], "start": values[0], "end": values[1], "over": [begin, stop]}
    return _number(weight, owner)


def weight_at(weight: float | Mapping[str, Any], progress: float) -> float:
    """Value of a checked weight after the share `progress` of the training steps, in [0, 1]."""
    if not isinstance(weight, Mapping):
        return weight
    begin, stop = weight["over"]
    x = min(1.0, max(0.0, (progress - begin) / (stop - begin)))
    return weight["start"] + (weight["end"] - weight["start"]) * SCHEDULES[weight["schedule"]](x)


def _number(value: Any, owner: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise RMTKDError(f"{owner}(weight={value!r}): expected a number of at least 0, or a schedule.")
    return float(value)
