"""Constraints that stand inside `Annotated`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal


__all__ = ["Interval", "Json", "Length"]


@dataclass(frozen=True)
class Interval:
    """Where a number has to lie.

    Attributes:
        low, high: bounds; infinite: none.
        closed: which bounds belong to it: "both", "left", "right" or "neither".
        what: what the number means, for the message, with its article: "a share of the parameters".
    """

    low: float = -math.inf
    high: float = math.inf
    closed: Literal["both", "left", "right", "neither"] = "both"
    what: str = ""

    @property
    def has_low(self) -> bool:
        return self.closed in ("both", "left")

    @property
    def has_high(self) -> bool:
        return self.closed in ("both", "right")

    def holds(self, value: float) -> bool:
        """NaN is in no interval."""
        above = value >= self.low if self.has_low else value > self.low
        below = value <= self.high if self.has_high else value < self.high
        return above and below

    def described(self, noun: str) -> str:
        """For example "a number above 0", "a share of the steps, in (0, 1]"."""
        what = self.what or noun
        if math.isfinite(self.low) and math.isfinite(self.high):
            left, right = "[" if self.has_low else "(", "]" if self.has_high else ")"
            return f"{what}{',' * bool(self.what)} in {left}{self.low}, {self.high}{right}"
        if math.isfinite(self.low):
            return f"{what} {'of at least' if self.has_low else 'above'} {self.low}"
        if math.isfinite(self.high):
            return f"{what} {'of at most' if self.has_high else 'below'} {self.high}"
        return what


@dataclass(frozen=True)
class Json:
    """A mapping or a list holds what JSON can, and is kept as JSON would give it back: text for keys, lists for
    tuples."""


@dataclass(frozen=True)
class Length:
    """How many items a tuple, a list or a mapping has to hold."""

    low: int = 1
    high: int | None = None

    def holds(self, value: Collection) -> bool:
        return self.low <= len(value) and (self.high is None or len(value) <= self.high)

    def described(self, noun: str) -> str:
        return f"{noun} of {self.low} or more" if self.high is None else f"{noun} of {self.low} to {self.high}"
