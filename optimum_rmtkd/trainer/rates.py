"""Which learning rate a distillation after a cut stands, and how slowly it has to begin.

Pure functions of three numbers; they know no trainer and no model.

Measured (docs/guides/rates.md), not derived. A student that was cut is a disturbed copy of its teacher. A small rate
repairs it; a large one first destroys what the cut had left, and then needs many steps to learn it again. So the rate
at which a stage ends best grows with the number of its steps, about as their square root, and up to four fifths with
the share that was removed: less is left that a large rate could destroy. In epochs there is no rule: an epoch of one
data set has forty times the steps of another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import RMTKDError


__all__ = ["FIT_SHARE", "Rate", "distil_rate", "few_steps", "fit_pace", "rate_band", "warmup_steps"]

CENTRE, CENTRE_STEPS = 1e-4, 512  # the middle of the band from four fifths removed on
WIDTH = 1.25  # from the middle to either border, as a factor
FLOOR, CEILING = 2e-5, 3e-4  # of every band: no rate outside was ever the best
WARMUP_SHARE, WARMUP_LIMITS = 0.06, (5, 200)  # of a stage; its least and greatest
FIT_SHARE, LONGEST_FIT = 0.4, 0.6  # of the steps, to fine-tune a model that cannot teach yet: of many, and of few
FIT_STEPS = 500  # so many are worth a larger share
LARGE_CUT, FEW_STEPS = (
    0.6,
    512,
)  # a cut from which on, and steps up to which, points were lost


@dataclass(frozen=True)
class Rate:
    """A peak learning rate.

    Attributes:
        value: of an optimizer of the Adam family.
        why: one line for the log.
    """

    value: float
    why: str


def rate_band(removed: float, steps: int) -> tuple[float, float]:
    """(lowest, highest) learning rate with which a stage, the distillation after one cut, begins if it is to end well;
    from there it decays.

    Args:
        removed: share of all parameters of the uncut model that is gone after this cut, earlier cuts included; in
            (0, 1).
        steps: optimizer steps from this cut to the next one, or to the end; at least 1.

    Raises:
        RMTKDError: a value outside its range.
    """
    if not 0 < removed < 1:
        raise RMTKDError(f"removed = {removed}: expected the share of the parameters that the cuts remove, in (0, 1).")
    if steps < 1:
        raise RMTKDError(f"steps = {steps}: expected the number of optimizer steps of the distillation, at least 1.")
    gone = min(1.0, math.sqrt(removed / (1 - removed)) / 2)  # 1 from four fifths on
    centre = CENTRE * gone * math.sqrt(steps / CENTRE_STEPS)
    low, high = (min(max(border, FLOOR), CEILING) for border in (centre / WIDTH, centre * WIDTH))
    return low, high


def distil_rate(given: float, removed: float, steps: int) -> Rate:
    """The learning rate a stage begins with: the one that was given, moved into `rate_band`.

    Args:
        given: learning rate of the training arguments, the peak of its schedule; for an optimizer of the Adam family,
            whose steps are as long as the rate says whatever the gradient. 0 (nothing is to be trained) stays 0.
        removed, steps: as in `rate_band`.

    Raises:
        RMTKDError: a value outside its range; a rate that is negative or not finite.
    """
    if not (math.isfinite(given) and given >= 0):
        raise RMTKDError(f"learning rate {given}: expected a finite number, at least 0.")
    low, high = rate_band(removed, steps)
    value = min(max(given, low), high) if given else 0.0
    cut = f"{removed:.0%} of the parameters removed and {steps:,} steps to distil"
    if not given:
        return Rate(value, "learning rate 0: nothing is trained")
    if low <= given <= high:
        return Rate(value, f"learning rate {given:.2g} as given: {cut} allow {low:.2g} to {high:.2g}")
    side = "lowest" if given < low else "highest"
    why = f"learning rate {value:.2g} instead of {given:.2g}: the {side} that {cut} allow"
    return Rate(value, f"{why}; distil_learning_rate={given:.2g} would keep it")


def fit_pace(steps: int) -> tuple[float, float]:
    """(share of the steps of a run that fine-tune a model first, what the given learning rate is multiplied by there).

    A fit has to do in a part of the steps what the script would have done in all of them. Where there are thousands,
    0.4 of them at the given rate do; where there are few, more of them at a higher rate: up to 0.6 at 1.5 times the
    rate (docs/guides/rates.md).

    Raises:
        RMTKDError: fewer than one step.
    """
    if steps < 1:
        raise RMTKDError(f"steps = {steps}: expected the number of optimizer steps of the run, at least 1.")
    share = min(max(FIT_SHARE, FIT_STEPS / steps), LONGEST_FIT)
    return share, share / FIT_SHARE


def few_steps(removed: float, steps: int) -> str | None:
    """What to expect of a large cut with few steps behind it, and what to do; None where the steps are not few.

    Args:
        removed, steps: as in `rate_band`.
    """
    if removed < LARGE_CUT or steps >= FEW_STEPS:
        return None
    return (
        f"{steps:,} {'step is' if steps == 1 else 'steps are'} few to distil after a cut of {removed:.0%} of the "
        "parameters. Where it was measured, cuts of 80% lost 3 to 5 points of accuracy after 64 to 268 steps of 32 "
        "samples, 1.4 after 512 and 0.5 after 2,105. More epochs or a smaller target_reduction lose less."
    )


def warmup_steps(steps: int) -> int:
    """Steps of the linear warm-up after a cut, in a stage of so many optimizer steps: Adam knows nothing of the new
    weights yet, and its first steps are as long as its last.

    Raises:
        RMTKDError: fewer than one step.
    """
    if steps < 1:
        raise RMTKDError(f"steps = {steps}: expected the number of optimizer steps of the stage, at least 1.")
    least, most = WARMUP_LIMITS
    return min(max(math.ceil(WARMUP_SHARE * steps), least), most, steps // 2)
