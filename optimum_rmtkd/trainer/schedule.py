"""The learning rate over a run: one schedule a phase (fit, distil), and a short warm-up after each cut.

Plain functions over plain data: which schedule is the user's own is a function, `shape`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


__all__ = ["Phase", "factor_at", "planned_steps", "stretched"]

LOOKS = 64
Shape = Callable[[int], Callable[[int], float]]


@dataclass(frozen=True)
class Phase:
    """A part of the run with a schedule of its own.

    Attributes:
        name: "fit" or "distil".
        start, steps: first optimizer step, and their number.
        factor: the highest learning rate from `since` on, as a multiple of the peak that the user gave.
        warmups: (step, steps) of each linear warm-up after a cut.
        since: step from which on `factor` is meant; None: the start.
    """

    name: str
    start: int
    steps: int
    factor: float = 1.0
    warmups: tuple[tuple[int, int], ...] = ()
    since: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self) | {"warmups": [list(pair) for pair in self.warmups]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Phase:
        """Inverse of `to_dict`."""
        return cls(**{**values, "warmups": tuple(tuple(pair) for pair in values["warmups"])})


def factor_at(step: int, phases: Sequence[Phase], shape: Shape) -> float:
    """What the user's peak rate is multiplied by at a step, counted from 0.

    Args:
        phases: in their order; none: the user's schedule as it is would be `shape(max_steps)(step)`.
        shape: number of steps -> the user's schedule over so many, which gives a multiple of the peak rate at each.
    """
    phase = next((phase for phase in reversed(phases) if step >= phase.start), phases[0])
    run = shape(phase.steps)
    factor = phase.factor * run(step - phase.start)
    if phase.since is not None and (highest := _highest(run, phase.since - phase.start, phase.steps)) > 0:
        factor /= highest
    for cut, steps in phase.warmups:
        if cut <= step < cut + steps:
            factor *= (step - cut + 1) / (steps + 1)
    return factor


def _highest(run: Callable[[int], float], first: int, steps: int) -> float:
    """The highest value of a schedule from a step on. It is looked at where `LOOKS` steps lie evenly spaced: schedules
    rise or fall for longer than that."""
    stride = max(1, (steps - first) // LOOKS)
    return max(run(step) for step in range(first, max(steps, first + 1), stride))


def stretched(shape: Callable[[int], float], whole: int) -> Shape:
    """A schedule over `whole` steps as one over any number: each phase runs through all of it, warm-up and all."""
    return lambda steps: lambda step: shape(round(step * whole / steps))


def planned_steps(shape: Callable[[int], float], steps: int) -> int:
    """Steps in the user's schedule. One that was planned for fewer than there are (`num_training_steps` counted in
    optimizer steps, in several processes) ends where it was planned to."""
    planned = getattr(shape, "keywords", {}).get("num_training_steps")
    return min(planned, steps) if planned else steps
