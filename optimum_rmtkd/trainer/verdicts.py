"""How a stage is judged: plain functions over numbers.

Three questions, asked of the metric that judges the stages: is it worse than just after the cut, has it come back
close enough to the uncut model for another cut, and was it lost in a way that the user must hear of?
"""

from __future__ import annotations

import math
from collections.abc import Iterable


__all__ = ["come_back", "farther", "fell", "greater_is_better", "noise", "spoiled", "telling", "worse"]

SMALLER_IS_BETTER = ("loss", "perplexity", "ppl", "error", "mse", "rmse", "mae", "wer", "cer")
TELLING = ("loss", "f1", "exact_match", "exact", "accuracy", "matthews_correlation", "pearson", "spearmanr", "rougel")
TELLING += ("rouge1", "bleu", "sacrebleu", "score", "perplexity")
LOSS_NOISE = 0.1  # of a loss: it moves that much between two equally good models, and grows with their confidence
LEAST_NOISE = 0.005  # of a metric
SPOILED, SPOILED_LOSS = 0.03, 0.25  # of a metric, of a loss
LEAST_NATS = 0.05  # of a divergence
FEW_ROWS = 100  # of a validation set of unknown size, where a metric that nobody asked for is looked at
NEAR = 0.9  # of a metric's way from nothing to the uncut model's value (the paper's threshold of a stage)
NEAR_LOSS = 0.5  # of a loss's way from the uncut model's value to that of knowing nothing


def greater_is_better(name: str) -> bool:
    """Direction of a metric by the words of its name: losses, errors and perplexities are to be small, their negatives
    (neg_mean_squared_error) are not."""
    words = name.lower().split("_")
    small = words[-1] in SMALLER_IS_BETTER or words[-2:] == ["error", "rate"]
    return not small or bool({"neg", "negative"}.intersection(words))


def telling(names: Iterable[str]) -> str | None:
    """The metric that says most of a model among those of an evaluation, by the field's names for them; None where
    none is known."""
    known = {name.removeprefix("eval_").lower(): name for name in names}
    return next((known[word] for word in TELLING if word in known), None)


def noise(value: float, greater_is_better: bool, rows: int | None = None) -> float:
    """How far two measurements of equally good models may lie apart.

    A tenth of a loss. One standard error of a share of `rows` samples, sqrt(p (1 - p) / n), at least half a point;
    below one half (a correlation, which may be negative) as at one half. The same of a share in percent. A hundredth
    of other metrics.
    """
    if not greater_is_better:
        return LOSS_NOISE * abs(value)
    unit = 1.0 if abs(value) <= 1.0 else 100.0
    if abs(value) > unit:
        return 0.01 * abs(value)
    share = max(0.5, value / unit)
    error = math.sqrt(share * (1.0 - share) / rows) if rows else 2 * LEAST_NOISE
    return unit * max(LEAST_NOISE, error)


def worse(after: float, cut: float, greater_is_better: bool, rows: int | None = None) -> bool:
    """Is the distilled model worse than it was just after its cut, by more than the noise? NaN counts as worse, but
    not than NaN: a correlation of answers that are all the same is none."""
    if not math.isfinite(cut):
        return False
    lost = cut - after if greater_is_better else after - cut
    return not lost <= noise(cut, greater_is_better, rows)


def spoiled(after: float, cut: float, greater_is_better: bool, rows: int | None = None) -> bool:
    """The same in the midst of a run, where a stage that will end well may pass through worse moments: more than a
    quarter of a loss, or 3 points of a metric and twice its noise (docs/guides/rates.md has what was seen)."""
    if not math.isfinite(cut):
        return False
    if not greater_is_better:
        return not after - cut <= SPOILED_LOSS * abs(cut)
    points = SPOILED * (1.0 if abs(cut) <= 1.0 else max(100.0, abs(cut)))
    return not cut - after <= max(points, 2 * noise(cut, greater_is_better, rows))


def fell(after: float, cut: float, rows: int | None = None) -> bool:
    """Has a metric that nobody asked for, the greater the better, fallen by what is no noise: 3 points, and twice the
    standard error of a set of `FEW_ROWS`, where its size is unknown?"""
    return spoiled(after, cut, True, rows or FEW_ROWS)


def farther(after: float, cut: float, midst: bool = False) -> bool:
    """Is the distilled model farther from the uncut one than just after its cut, by their divergence in nats an
    answer, of which a few hundredths are nothing? In the midst of a run a quarter, and a tenth of a nat, are allowed,
    as of a loss."""
    share, least = (SPOILED_LOSS, 2 * LEAST_NATS) if midst else (LOSS_NOISE, LEAST_NATS)
    return math.isfinite(cut) and not after - cut <= max(least, share * cut)


def come_back(value: float, baseline: float, greater_is_better: bool, chance: float | None = None) -> bool:
    """Is the model close enough to what it was before the first cut to be cut again? NaN is not.

    A metric to `NEAR` of the uncut model's; a loss at most half-way to that of knowing nothing (`chance`), or, where
    that is unknown, at most twice the uncut model's.
    """
    if greater_is_better:
        return value >= baseline - (1.0 - NEAR) * abs(baseline)
    if chance is not None and chance > baseline:
        return value <= baseline + NEAR_LOSS * (chance - baseline)
    return value <= baseline + max(abs(baseline), LOSS_NOISE)
